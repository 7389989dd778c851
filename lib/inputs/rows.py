"""What every reader of a data set gives: its splits row by row, and the names of its classes.

Axis letters: **C** channels, **n** rows of a split, **h**, **w** height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .pixels import rgb

# names of a split in a data set, and ours
SPLIT_OF_NAME = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


class Rows(NamedTuple):
    """Holds a split as it is stored: labels (n,), and by row the image and its stored bytes.

    job: gives by row a call that decodes its image in any process, and is pickled to get there: a
    function of a module with its arguments, no more than that row needs.
    """

    labels: np.ndarray
    decode: Callable[[int], Tensor]  # (C, h, w) uint8
    stored: Callable[[int], bytes] | None  # None where only decoded images are there
    job: Callable[[int], Callable[[], Tensor]] | None = None  # None where this process alone can


Read = tuple[dict[str, Rows], list[str]]  # by split, and the names of the classes


def rows_in_files(
    labels: np.ndarray, files: Sequence[Path], decode: Callable[[Path], Tensor]
) -> Rows:
    """Gives the rows of a split that has a file an image. labels: (n,).

    decode: a function of a module, since other processes decode, too.
    """
    return Rows(
        labels,
        lambda row: decode(files[row]),
        lambda row: files[row].read_bytes(),
        lambda row: partial(decode, files[row]),
    )


def picture(file: Path) -> Tensor:
    """Decodes a picture to (3, h, w) uint8; raises ValueError with its path for a damaged one."""
    try:  # by content: some files are GIF or PNG and named .jpg
        return rgb(file)
    except Exception as error:  # PIL raises many kinds on damaged files
        raise ValueError(
            f"{file} does not decode: {error}. Repair or replace it; "
            "images are never skipped in silence"
        ) from error
