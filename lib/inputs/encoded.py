"""Decodes the images in a column of a table, in this process or in one that opens it anew.

Axis letters: **n** rows of a split.
"""

from __future__ import annotations

import functools
import io
import os.path
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .pixels import rgb
from .rows import Rows

if TYPE_CHECKING:
    import datasets


def rows_in_table(
    labels: np.ndarray, table: datasets.Dataset, column: str, where: str, folders: Sequence[Path]
) -> Rows:
    """Gives the rows of a table with their labels (n,).

    where: begins the messages of the ValueErrors for a bad image; folders: of the data set, outside
    of which no file is read that a row names in place of its bytes. From the first of them relative
    paths lead on.
    """
    folders = tuple(os.path.abspath(folder) for folder in folders)
    encoded = _Encoded(table, column, where, folders)
    files = tuple(file["filename"] for file in table.cache_files)

    def job(row: int) -> Callable[[], Tensor]:
        return functools.partial(_decoded, files, column, where, folders, row)

    # one that lies in memory, or was chosen from, is no whole list of files
    in_files = bool(files) and table._indices is None
    return Rows(labels, encoded.image, encoded.stored, job if in_files else None)


class _Encoded:
    """The encoded images in the column of a table."""

    def __init__(self, table: datasets.Dataset, column: str, where: str, folders: tuple[str, ...]):
        import datasets

        images = table.select_columns([column])
        self.table = images.cast_column(column, datasets.Image(decode=False))
        self.column, self.where, self.folders = column, where, folders

    def stored(self, row: int) -> bytes:
        """Reads the stored bytes of a row, or of the file that it names; ValueError for one without
        image, for a file that is not there, and for one that is no part of the data set."""
        item = self.table[row][self.column]
        if item is None or not (item["bytes"] or item["path"]):
            raise ValueError(f"{self.where}, row {row} has no image: remove it")
        if item["bytes"]:
            return item["bytes"]
        file = os.path.normpath(os.path.join(self.folders[0], item["path"]))
        if not any(Path(file).is_relative_to(folder) for folder in self.folders):
            raise ValueError(
                f"{self.where}, row {row} names the file {item['path']}, which is outside "
                f"{self.folders[0]} and is not read: write the image's bytes into the table, or "
                "put the file there and name it by its path from there"
            )
        try:
            return Path(file).read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.where}, row {row} names the file {file}, which does not read: {error}. Put "
                "it there, or remove the row"
            ) from error

    def image(self, row: int) -> Tensor:
        """Decodes the image of a row; ValueError for one that does not."""
        stored = self.stored(row)
        try:
            return rgb(io.BytesIO(stored))
        except Exception as error:  # PIL raises many kinds on damaged files
            raise ValueError(
                f"{self.where}, row {row} does not decode: {error}. Repair or remove the row; "
                "images are never skipped in silence"
            ) from error


@functools.lru_cache(maxsize=4)  # of a process that reads for a run
def _encoded_in(
    files: tuple[str, ...], column: str, where: str, folders: tuple[str, ...]
) -> _Encoded:
    """Opens a table anew, by the files that it lies in on disk."""
    import datasets

    parts = [datasets.Dataset.from_file(file) for file in files]
    return _Encoded(datasets.concatenate_datasets(parts), column, where, folders)


def _decoded(
    files: tuple[str, ...], column: str, where: str, folders: tuple[str, ...], row: int
) -> Tensor:
    return _encoded_in(files, column, where, folders).image(row)
