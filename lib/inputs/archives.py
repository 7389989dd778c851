"""Data sets in the folders that their authors publish: GEO-Bench (HDF5 files) and MIT Indoor (lists
of images).

Each reader gives, by split, the (n,) labels and a function row -> (3, h, w) uint8, and the class
names. Nothing is unpickled: of a GEO-Bench sample only the arrays are read, its label comes from
the data set's JSON. Images are decoded on demand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Decoded = tuple[np.ndarray, Callable[[int], Tensor]]
COLOURS = ("red", "green", "blue")
LISTS = {"train": "TrainImages.txt", "test": "TestImages.txt"}


def reader(folder: Path) -> Callable[[Path], tuple[dict[str, Decoded], list[str]]] | None:
    """The reader for a folder, by the files that only its kind has; None for parquet and class
    folders.

    A folder that lacks a part still counts as its kind: the reader names the part, another reader
    would cut splits of its own.
    """
    if (folder / "default_partition.json").is_file() or any(folder.glob("*.hdf5")):
        return geobench
    return mit_indoor if any((folder / name).is_file() for name in LISTS.values()) else None


def geobench(folder: Path) -> tuple[dict[str, Decoded], list[str]]:
    """A classification set of GEO-Bench 1.0: SAMPLE.hdf5 files, default_partition.json (splits) and
    label_map.json (labels).

    Read are the bands red, green and blue, 8 bits each, as m-forestnet and m-pv4ger have them.
    Raises ValueError, with the file, for JSON that does not read, a sample without label or file,
    in two splits or two classes, and bands that are absent, of several dates, or of another type.
    """
    partition, label_map = (
        _json(folder / name) for name in ("default_partition.json", "label_map.json")
    )
    names = sorted(label_map, key=lambda name: (len(name), name))  # numbers as text: 2 before 10
    label: dict[str, int] = {}
    for number, name in enumerate(names):
        for sample in label_map[name]:
            if sample in label:
                raise ValueError(
                    f"{folder / 'label_map.json'}: sample {sample} is in classes {names[label[sample]]} and "
                    f"{name}: one label a sample is read"
                )
            label[sample] = number
    splits, seen = {}, {}
    for theirs, ours in (("train", "train"), ("valid", "val"), ("test", "test")):
        samples = partition.get(theirs)
        if not samples:
            raise ValueError(
                f"{folder / 'default_partition.json'} has no samples under {theirs!r}: it needs train, valid and "
                "test"
            )
        for sample in samples:
            if sample in seen:
                raise ValueError(
                    f"{folder / 'default_partition.json'}: sample {sample} is in {seen[sample]} and in {theirs}"
                )
            seen[sample] = theirs
            if sample not in label:
                raise ValueError(
                    f"{folder / 'label_map.json'} gives no label to sample {sample} of the {theirs} split"
                )
            if not (folder / f"{sample}.hdf5").is_file():
                raise ValueError(
                    f"{folder}: sample {sample} of the {theirs} split has no file {sample}.hdf5"
                )
        files = [folder / f"{sample}.hdf5" for sample in samples]
        splits[ours] = (
            np.array([label[s] for s in samples]),
            lambda row, files=files: _bands(files[row]),
        )
    return splits, names


def _json(file: Path) -> dict[str, list]:
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read as JSON ({error}): a GEO-Bench folder has default_partition.json and "
            "label_map.json beside its samples"
        ) from error
    if not isinstance(held, dict) or not all(
        isinstance(samples, list) for samples in held.values()
    ):
        raise ValueError(
            f'{file} must map names to lists of samples, as in {{"train": ["sample_1", ...]}}'
        )
    return held


def _bands(file: Path) -> Tensor:
    """(3, h, w) uint8 of one sample. Bands are named "Red", or "04 - Red_2016-01-01" with a number
    and a date."""
    import h5py

    try:
        with h5py.File(file, "r") as held:
            found = {
                colour: [name for name in held if _plain(name) == colour] for colour in COLOURS
            }
            if wrong := [colour for colour, names in found.items() if len(names) != 1]:
                raise ValueError(
                    f"{file} has {', '.join(f'{len(found[c])} bands of {c}' for c in wrong)} among "
                    f"{', '.join(held)}: exactly one of each is needed, of one date"
                )
            bands = [np.asarray(held[names[0]]) for names in found.values()]
    except (OSError, KeyError, RuntimeError) as error:  # what h5py raises on damaged files
        raise ValueError(
            f"{file} does not read as HDF5 ({error}): repair or replace it; images are never skipped in "
            "silence"
        ) from error
    if len({band.shape for band in bands}) > 1 or bands[0].ndim != 2:
        raise ValueError(
            f"{file} has bands of shape {', '.join(str(band.shape) for band in bands)}: all must have one height "
            "and width"
        )
    pixels = np.stack(bands)
    if (
        pixels.min() < 0
        or pixels.max() > 255
        or (pixels.dtype.kind == "f" and (pixels != pixels.round()).any())
    ):
        raise ValueError(
            f"{file} holds values from {pixels.min()} to {pixels.max()} of type {pixels.dtype}: bands of whole "
            "numbers from 0 to 255 are read; other sensors need a scale of their own"
        )
    return torch.from_numpy(pixels.astype(np.uint8))


def _plain(band: str) -> str:
    return re.sub(r"_\d{4}-\d{2}-\d{2}.*$", "", re.sub(r"^\d+\w? - ", "", band)).strip().lower()


def mit_indoor(folder: Path) -> tuple[dict[str, Decoded], list[str]]:
    """MIT Indoor scenes (Quattoni & Torralba, CVPR 2009): Images/CLASS/FILE.jpg with
    TrainImages.txt and TestImages.txt.

    There is no validation split; one is cut from training. Raises ValueError for an empty or absent
    list, a file that is listed and absent, and one in both lists.
    """
    listed = {}
    for split, name in LISTS.items():
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}: MIT Indoor comes with TrainImages.txt and TestImages.txt"
            )
        listed[split] = [
            line.strip() for line in (folder / name).read_text().splitlines() if line.strip()
        ]
        if not listed[split]:
            raise ValueError(f"{folder / name} lists no image")
        if absent := [line for line in listed[split] if not (folder / "Images" / line).is_file()]:
            raise ValueError(
                f"{folder / name} lists {absent[0]}, which is not in {folder / 'Images'}; {len(absent)} such in "
                "all. Unpack the images again, or take the lines out"
            )
    if both := set(listed["train"]) & set(listed["test"]):
        raise ValueError(f"{folder}: {sorted(both)[0]} is in the training and in the test list")
    names = sorted({line.split("/")[0] for line in listed["train"]})
    if strange := {line.split("/")[0] for line in listed["test"]} - set(names):
        raise ValueError(
            f"{folder / 'TestImages.txt'}: class {sorted(strange)[0]} has no training image"
        )
    splits = {}
    for split, lines in listed.items():
        labels = np.array([names.index(line.split("/")[0]) for line in lines])
        splits[split] = labels, lambda row, lines=lines: _picture(folder / "Images" / lines[row])
    return splits, names


def _picture(file: Path) -> Tensor:
    try:  # by content: some files are GIF or PNG and named .jpg
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
    except Exception as error:  # PIL raises many kinds on damaged files
        raise ValueError(
            f"{file} does not decode: {error}. Repair or replace it; images are never skipped in "
            "silence"
        ) from error
