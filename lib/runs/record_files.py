"""Bundles of records that travel: files of limited size, each checked by its SHA-256 as a whole.

A bundle is the SHA-256 of what follows, a line break, and a zip file: the two files of each record,
and `planned.json`, the ids of all runs that were packed with them.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .. import paths
from .store import Record

LIMIT = 16 * 10**6  # bytes; a record that has more goes into a bundle of its own
PLANNED, SUFFIX = "planned.json", ".moe"


class Damaged(ValueError):
    """Says which bundle is not as it was written."""


def read(file: Path) -> dict[str, bytes]:
    """Reads the members of a bundle by name. Raises Damaged for one with another SHA-256, and
    ValueError for a file that is not there or is no bundle."""
    if not file.is_file():
        raise ValueError(f"{file} is not there: give the files that `records` of the pack holds")
    if file.suffix != SUFFIX:
        raise ValueError(
            f"{file} holds no packed records: give the files records-*{SUFFIX} of a pack"
        )
    digest, _, body = file.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise Damaged(f"{file} is damaged: its SHA-256 is not the one in it; copy it again")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def append(folder: Path, record: Record, planned: Sequence[str]) -> None:
    """Adds a record to the last bundle of a folder, or to a new one where it would be too large."""
    files = sorted(folder.glob(f"records-*{SUFFIX}"))
    added = {
        file.name: file.read_bytes()
        for file in (record.file.with_suffix(".npz"), record.file)
        if file.is_file()
    }
    if files:
        bundle = _bundle(read(files[-1]) | added)
        if len(bundle) <= LIMIT:
            return _write(files[-1], bundle)
    first = {PLANNED: json.dumps(list(planned)).encode()}
    _write(folder / f"records-{len(files):03d}{SUFFIX}", _bundle(first | added))


def _bundle(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    body = out.getvalue()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _write(file: Path, bundle: bytes) -> None:
    with paths.written_whole(file) as part:
        part.write_bytes(bundle)
