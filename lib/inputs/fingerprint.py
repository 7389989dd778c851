"""Says which data a run has seen, so that other data of the same name are not taken for them.

Axis letters: **n** rows of a split.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import paths

if TYPE_CHECKING:
    from .sources import Source

# rows of a split whose encoded images are read, at even distances: all of a small set, and few
# enough of a large one to do it before every run
SAMPLED_ROWS = 1000


def of(sources: Mapping[str, Source], class_names: Sequence[str]) -> dict[str, Any] | None:
    """Computes the fingerprint of a data set: rows and labels a split, and a digest.

    rows: {split: n}; labels: {split: images of each class, in label order}; digest: of all class
    names and labels, and of the stored bytes of at most `SAMPLED_ROWS` images a split. A larger set
    in which only other images were replaced keeps its fingerprint. None where a source does not
    give its stored bytes.
    """
    digest = hashlib.sha256("\n".join(class_names).encode(errors="surrogatepass"))
    for split in sorted(sources):
        source = sources[split]
        if source.stored is None:
            return None
        n = len(source.labels)
        digest.update(f"{split} {n};".encode() + source.labels.astype("<i8").tobytes())
        for row in np.unique(np.linspace(0, max(n - 1, 0), min(n, SAMPLED_ROWS)).astype(int)):
            # a digest a row: bytes cannot move from one image to the next unseen
            digest.update(hashlib.sha256(source.stored(int(row))).digest())
    labels = {
        split: np.bincount(source.labels, minlength=len(class_names)).tolist()
        for split, source in sources.items()
    }
    rows = {split: len(source.labels) for split, source in sources.items()}
    return {"rows": rows, "labels": labels, "digest": digest.hexdigest()[:16]}


def marks(place: Path) -> str | None:
    """Hashes path, size, times and number of all files and folders at a place, without reading any;
    None where nothing is.

    They are those of `paths.marks_of`. What begins with a dot is left out, and so is what cannot be
    looked at, which readers name.
    """
    digest, is_there = hashlib.sha256(), False
    for path in [place] if place.is_file() else _all_below(place):
        try:
            status = os.stat(path)
        except OSError:
            continue
        digest.update(f"{path} {paths.marks_of(status)}\n".encode(errors="surrogatepass"))
        is_there = True
    return digest.hexdigest()[:16] if is_there else None


def _all_below(folder: Path) -> Iterator[str]:
    """Yields a folder and what is below it, in one order; links are followed, into each folder
    once."""
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        yield where
        real = os.path.realpath(where)
        # in place: os.walk goes down only what is left here
        folders[:] = [] if real in seen else sorted(f for f in folders if f[0] != ".")
        if real not in seen:
            yield from (os.path.join(where, name) for name in sorted(names) if name[0] != ".")
        seen.add(real)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Says how two fingerprints differ, None if they are equal."""
    for what in ("rows", "labels"):
        if before[what] != now[what]:
            if what == "rows":
                return f"it had {before['rows']} rows and has {now['rows']}"
            return "its labels are others"
    return None if before["digest"] == now["digest"] else "its images or labels are others"
