"""Writes and reads data sets as one file of the rows that some runs use, already decoded.

Such a file travels to machines that have neither the data set nor what decodes it. It lies under
MOE_DATA, is safetensors, and holds for each stored split: `labels.COLUMN.SPLIT` (all rows, because
splits are drawn by label), `rows.SPLIT` (rows with an image), `shapes.SPLIT` and `pixels.SPLIT`
(their images, one after the other); in its header the classes of each column and C.

Axis letters: **C** channels, **n** images of a split, **h**, **w** height and width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import paths
from .archives import LabelsAndDecoder

if TYPE_CHECKING:
    from .sources import Opened


def file_of(home: Path, name: str) -> Path:
    """Names the packed file of a data set. name: as in `DataSpec`."""
    return home / quote(name, safe="") / "packed.safetensors"


def write(file: Path, opened: Mapping[str, Opened], rows: Mapping[str, Collection[int]]) -> None:
    """Decodes the rows and writes the file.

    opened: by label column, what `sources_of` gives; rows: by stored split, those with an image.
    """
    classes = {label: class_names for label, (_, class_names) in opened.items()}
    sources, _ = next(iter(opened.values()))
    tensors: dict[str, Tensor] = {}
    for split, source in sources.items():
        for label, (sources_of_label, _) in opened.items():
            labels = torch.from_numpy(sources_of_label[split].labels)
            tensors[f"labels.{label}.{split}"] = labels.clone()  # columns may share memory
        ordered = sorted(rows.get(split, ()))
        images = [source.image(row) for row in ordered]
        shapes = [image.shape for image in images]
        nothing = torch.zeros(0, dtype=torch.uint8)
        tensors[f"rows.{split}"] = torch.tensor(ordered, dtype=torch.int64)
        tensors[f"shapes.{split}"] = torch.tensor(shapes, dtype=torch.int64).view(-1, 3)
        tensors[f"pixels.{split}"] = torch.cat([nothing, *(image.flatten() for image in images)])
    header = {"classes": json.dumps(classes), "channels": str(sources["train"].channels)}
    with paths.written_whole(file) as part:
        save_file(tensors, part, metadata=header)


def read(file: Path, label: str) -> tuple[dict[str, LabelsAndDecoder], list[str], int]:
    """Reads a packed file: by split the (n,) labels and the decoder, then the classes, then C.

    Raises ValueError for a label column that was not packed; the decoder does for such a row.
    """
    with safe_open(file, "pt") as handle:
        header = handle.metadata()
    classes = json.loads(header["classes"])
    if label not in classes:
        raise ValueError(
            f"{file} has no label column {label!r}, only {', '.join(classes)}: "
            "pack the runs that read it"
        )
    tensors = load_file(file)
    names = [name.removeprefix("rows.") for name in tensors if name.startswith("rows.")]
    splits = {
        split: (tensors[f"labels.{label}.{split}"].numpy(), _decoder(tensors, split, file))
        for split in names
    }
    return splits, classes[label], int(header["channels"])


def _decoder(tensors: Mapping[str, Tensor], split: str, file: Path) -> Callable[[int], Tensor]:
    """Makes the function from a row to its (C, h, w) uint8 image."""
    pixels, shapes = tensors[f"pixels.{split}"], tensors[f"shapes.{split}"].tolist()
    ends = np.cumsum([c * h * w for c, h, w in shapes]).tolist()
    place_of_row = {row: place for place, row in enumerate(tensors[f"rows.{split}"].tolist())}

    def decode(row: int) -> Tensor:
        if row not in place_of_row:
            raise ValueError(
                f"{file} has no image of row {row}, split {split}: pack the runs that read it"
            )
        place = place_of_row[row]
        c, h, w = shapes[place]
        return pixels[ends[place] - c * h * w : ends[place]].view(c, h, w)

    return decode
