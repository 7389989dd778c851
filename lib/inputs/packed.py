"""Writes and reads data sets as one file of the images that some runs use, already decoded.

Such a file travels to machines that have neither the data set nor what decodes it. It lies under
MOE_DATA, is safetensors, and holds for each stored split `labels.COLUMN.SPLIT` (all rows, because
splits are drawn by label) and for each row that is used `SPLIT.ROW` (its (C, h, w) uint8 image).
Its header names the classes of each column, C, and the data set's fingerprint by column.

Axis letters: **C** channels, **n** images of a split, **h**, **w** height and width.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import paths
from . import fingerprint
from .rows import Rows

if TYPE_CHECKING:
    from .sources import Opened


def file_of(home: Path, name: str) -> Path:
    """Names the packed file of a data set. name: as in `DataSpec`."""
    return home / quote(name, safe="") / "packed.safetensors"


def write(file: Path, opened: Mapping[str, Opened], rows: Mapping[str, Collection[int]]) -> None:
    """Decodes the rows and writes the file.

    opened: by label column, what `sources_of` gives; rows: by stored split, those that are used.
    """
    tensors: dict[str, Tensor] = {}
    for label, (sources, _) in opened.items():
        for split, source in sources.items():
            # columns may share their memory, which safetensors refuses
            tensors[f"labels.{label}.{split}"] = torch.from_numpy(source.labels).clone()
    sources, _ = next(iter(opened.values()))
    for split, rows_of_split in rows.items():
        for row in rows_of_split:
            tensors[f"{split}.{row}"] = sources[split].image(row).clone()
    classes = {label: class_names for label, (_, class_names) in opened.items()}
    header = {"classes": json.dumps(classes), "channels": str(sources["train"].channels)}
    prints = {label: fingerprint.of(*of_column) for label, of_column in opened.items()}
    header["fingerprints"] = json.dumps(prints)
    with paths.written_whole(file) as part:
        save_file(tensors, part, metadata=header)


def read(file: Path, label: str) -> tuple[dict[str, Rows], list[str], int]:
    """Reads a packed file: its rows by split, then the classes, then C.

    Raises ValueError for a label column that was not packed; the decoder does for such a row.
    """
    opened = _Packed(file)
    header = opened.handle.metadata()
    classes = json.loads(header["classes"])
    if label not in classes:
        raise ValueError(
            f"{file} has no label column {label!r}, only {', '.join(classes)}: "
            "pack the runs that read it"
        )

    def job(split: str, row: int) -> Callable[[], Tensor]:
        return partial(_image, file, split, row)

    splits = {}
    for split in ("train", "val", "test"):
        if (of_labels := f"labels.{label}.{split}") in opened.names:
            labels = opened.handle.get_tensor(of_labels).numpy()
            splits[split] = Rows(labels, partial(opened.image, split), None, partial(job, split))
    return splits, classes[label], int(header["channels"])


class _Packed:
    """A packed file that stays open: images are read when they are asked for."""

    def __init__(self, file: Path):
        self.file, self.handle = file, safe_open(file, "pt")
        self.names = set(self.handle.keys())

    def image(self, split: str, row: int) -> Tensor:
        """Reads the (C, h, w) uint8 image of a row; ValueError for one that was not packed."""
        if f"{split}.{row}" not in self.names:
            raise ValueError(
                f"{self.file} has no image of row {row}, split {split}: pack the runs that read it"
            )
        return self.handle.get_tensor(f"{split}.{row}")


_packed_here = functools.lru_cache(maxsize=4)(_Packed)  # of a process that reads for a run


def _image(file: Path, split: str, row: int) -> Tensor:
    return _packed_here(file).image(split, row)


def fingerprint_in(file: Path, label: str) -> dict[str, Any] | None:
    """Reads the fingerprint that the data set had when it was packed; None if it has none."""
    with safe_open(file, "pt") as handle:
        return json.loads(handle.metadata().get("fingerprints", "{}")).get(label)
