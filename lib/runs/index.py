"""Remembers of records that were verified what plans need, so that thousands are not read again.

One file in the cache holds, for each record, the marks of its two files when they were verified
(size, time of the last change of content and of the entry, number on the disk) and its facts
(`facts_of`). A record whose marks are the same is not opened. Any other is read and verified in
full, as is one that was changed a moment before: two changes in one tick of the disk's clock have
the same marks. Whatever part of `lib` says what facts mean has its hash in the file: other code
forgets them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import paths

TICK = 2 * 10**9  # nanoseconds; no clock of a disk is coarser
Facts = dict[str, Any]


class Index:
    """Holds what is remembered of the records of a store, by run."""

    def __init__(self, file: Path):
        self._file = file
        self._entries: dict[str, list[Any]] | None = None  # run -> [file, marks, facts]
        self._added: dict[str, list[Any]] = {}

    def facts(self, run: str) -> tuple[Path, Facts] | None:
        """Returns file and facts of a record whose files are as they were; None if none is."""
        entry = self._known().get(run)
        if entry is None or marks_of(entry[0]) != entry[1]:
            return None
        return Path(entry[0]), entry[2]

    def note(self, run: str, file: Path, marks: list[Any] | None, facts: Facts) -> None:
        """Remembers a record that was verified. marks: of its files before they were read."""
        newest = 0 if marks is None else max(max(part[1:3]) for part in marks if part)
        if marks is not None and time.time_ns() - newest > TICK:
            self._known()[run] = self._added[run] = [str(file), marks, facts]

    def save(self) -> None:
        """Writes what was added, to what other processes have written since; a full disk costs
        nothing but time."""
        if not self._added:
            return
        entries = self._read() | self._known()
        self._entries = dict(entries)  # which other threads may add to while this is written
        content = {"code": _code(), "entries": entries}
        with contextlib.suppress(OSError), paths.written_whole(self._file) as part:
            part.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
        self._added = {}

    def _known(self) -> dict[str, list[Any]]:
        if self._entries is None:
            self._entries = self._read()
        return self._entries

    def _read(self) -> dict[str, list[Any]]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            return content["entries"] if content["code"] == _code() else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}


def marks_of(file: str | Path) -> list[Any] | None:
    """Returns the marks of the JSON of a record and of its arrays; None where there is no JSON."""
    name = str(file)
    try:
        marks = [list(paths.marks_of(os.stat(name)))]  # lists, as JSON gives them back
    except OSError:
        return None
    try:
        marks.append(list(paths.marks_of(os.stat(name.removesuffix(".json") + ".npz"))))
    except OSError:
        marks.append(None)
    return marks


@functools.cache
def _code() -> str:
    """Hashes the code that says what a spec, a record and its facts are."""
    files = [*sorted((paths.LIB / "spec").glob("*.py"))]
    files += [paths.LIB / "runs" / f"{name}.py" for name in ("index", "store", "estimate")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def checksum_of(content: Any) -> str:
    """Computes the SHA-256 over a content of JSON, whatever white space its file has."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(content: Any) -> str:
    """Hashes a content of JSON, specs by what is hashed of them."""
    text = json.dumps(content, sort_keys=True, default=lambda spec: spec.canonical())
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def same_data(facts: Mapping[str, Any], now: Mapping[str, Any] | None) -> bool:
    """Says whether a record names no data, or has seen those that are there now."""
    return facts["data"] is None or (now is not None and facts["data"] == digest_of(now))
