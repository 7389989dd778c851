"""Decodes the images in a column of a table, in this process or in one that opens it anew.

Axis letters: **n** rows of a split.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .pixels import rgb
from .rows import Rows

if TYPE_CHECKING:
    import datasets


def rows_in_table(labels: np.ndarray, table: datasets.Dataset, column: str, where: str) -> Rows:
    """Gives the rows of a table with their labels (n,).

    where: begins the messages of the ValueErrors for a bad image.
    """
    encoded = _Encoded(table, column, where)
    files = tuple(file["filename"] for file in table.cache_files)

    def job(row: int) -> Callable[[], Tensor]:
        return functools.partial(_decoded, files, column, where, row)

    # one that lies in memory, or was chosen from, is no whole list of files
    in_files = bool(files) and table._indices is None
    return Rows(labels, encoded.image, encoded.stored, job if in_files else None)


class _Encoded:
    """The encoded images in the column of a table."""

    def __init__(self, table: datasets.Dataset, column: str, where: str):
        import datasets

        images = table.select_columns([column])
        self.table = images.cast_column(column, datasets.Image(decode=False))
        self.column, self.where = column, where

    def stored(self, row: int) -> bytes:
        """Reads the stored bytes of a row; ValueError for one without."""
        item = self.table[row][self.column]
        if item is None:
            raise ValueError(f"{self.where}, row {row} has no image: remove it")
        return item["bytes"] or Path(item["path"]).read_bytes()

    def image(self, row: int) -> Tensor:
        """Decodes the image of a row; ValueError for one that does not."""
        try:
            return rgb(io.BytesIO(self.stored(row)))
        except Exception as error:  # PIL raises many kinds on damaged files
            raise ValueError(
                f"{self.where}, row {row} does not decode: {error}. Repair or remove the row; "
                "images are never skipped in silence"
            ) from error


@functools.lru_cache(maxsize=4)  # of a process that reads for a run
def _encoded_in(files: tuple[str, ...], column: str, where: str) -> _Encoded:
    """Opens a table anew, by the files that it lies in on disk."""
    import datasets

    parts = [datasets.Dataset.from_file(file) for file in files]
    return _Encoded(datasets.concatenate_datasets(parts), column, where)


def _decoded(files: tuple[str, ...], column: str, where: str, row: int) -> Tensor:
    return _encoded_in(files, column, where).image(row)
