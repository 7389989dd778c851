"""Says which data a run has seen, so that other data of the same name are not taken for them.

Axis letters: **n** rows of a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Says how two fingerprints differ, None if they are equal."""
    for what in ("rows", "labels"):
        if before[what] != now[what]:
            if what == "rows":
                return f"it had {before['rows']} rows and has {now['rows']}"
            return "its labels are others"
    return None if before["digest"] == now["digest"] else "its images or labels are others"
