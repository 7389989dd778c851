"""Reads data sets in the folders that their authors publish: GEO-Bench and MIT Indoor.

GEO-Bench has a HDF5 file a sample, MIT Indoor lists of images. Each reader gives, by split, the
(n,) labels and a function from a row to its (3, h, w) uint8 image, and the class names. Nothing is
unpickled: of a GEO-Bench sample only the arrays are read, its label comes from the data set's JSON.
Images are decoded on demand.

Axis letters: **n** images of a split, **h**, **w** height and width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .rows import Read, picture, rows_in_files

if TYPE_CHECKING:
    import h5py


COLOURS = ("red", "green", "blue")
LISTS = {"train": "TrainImages.txt", "test": "TestImages.txt"}
FROM_OUTSIDE = "A sample holds its own values: get it again, or take it out"


def reader(folder: Path) -> Callable[[Path], Read] | None:
    """Chooses the reader of a folder, by the files that only its kind has.

    None for parquet and class folders. A folder that lacks a part still counts as its kind: the
    reader names the part, where another reader would cut splits of its own.
    """
    if (folder / "default_partition.json").is_file() or any(folder.glob("*.hdf5")):
        return geobench
    return mit_indoor if any((folder / name).is_file() for name in LISTS.values()) else None


# ---------------------------------------------------------------- GEO-Bench


def geobench(folder: Path, bands: Sequence[str] = COLOURS) -> Read:
    """Reads a classification set of GEO-Bench 1.0.

    It holds SAMPLE.hdf5 files, default_partition.json (splits) and label_map.json (labels). Read
    are three bands by their names, in this order, 8 bits each, as m-forestnet and m-pv4ger have
    them: red, green and blue; m-forestnet has nir, swir1 and swir2, too. Raises ValueError, with
    the file, for JSON that does not read, a sample without label or file, in two splits or two
    classes, and bands that are absent, of several dates, or of another type.
    """
    partition = _lists_by_name(folder / "default_partition.json")
    label_map = _lists_by_name(folder / "label_map.json")
    names = sorted(label_map, key=lambda name: (len(name), name))  # numbers as text: 2 before 10
    label_of_sample = _label_of_sample(folder / "label_map.json", label_map, names)
    splits, split_of_sample = {}, {}
    for their_split, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        samples = partition.get(their_split)
        if not samples:
            raise ValueError(
                f"{folder / 'default_partition.json'} has no samples under {their_split!r}: "
                "it needs train, valid and test"
            )
        for sample in samples:
            if sample in split_of_sample:
                raise ValueError(
                    f"{folder / 'default_partition.json'}: sample {sample} is in "
                    f"{split_of_sample[sample]} and in {their_split}: take it out of one"
                )
            split_of_sample[sample] = their_split
            if sample not in label_of_sample:
                raise ValueError(
                    f"{folder / 'label_map.json'} gives no label to sample {sample} of the "
                    f"{their_split} split: add it to its class, or take it out of "
                    "default_partition.json"
                )
            if not (folder / f"{sample}.hdf5").is_file():
                raise ValueError(
                    f"{folder}: sample {sample} of the {their_split} split has no file "
                    f"{sample}.hdf5: get it again, or take it out of default_partition.json"
                )
        files = [folder / f"{sample}.hdf5" for sample in samples]
        labels = np.array([label_of_sample[sample] for sample in samples])
        splits[split] = rows_in_files(labels, files, partial(_bands_of_sample, names=bands))
    return splits, names


def _lists_by_name(file: Path) -> dict[str, list]:
    """Reads a JSON file that maps names to lists of samples."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read as JSON ({error}): a GEO-Bench folder has "
            "default_partition.json and label_map.json beside its samples"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(samples, list) for samples in content.values()
    ):
        raise ValueError(
            f'{file} must map names to lists of samples, as in {{"train": ["sample_1", ...]}}'
        )
    for sample in chain.from_iterable(content.values()):
        # no path: a sample lies in the folder itself
        is_name = isinstance(sample, str) and PurePath(sample).name == sample not in ("", "..")
        if not is_name or "\\" in sample:
            raise ValueError(
                f"{file}: {sample!r} is no name of a sample, but a path or no text: name the files "
                "that lie in the folder itself, without .hdf5"
            )
    return content


def _label_of_sample(file: Path, label_map: dict[str, list], names: list[str]) -> dict[str, int]:
    """Turns {class name: samples} into {sample: number of its class}, in the order of `names`."""
    label_of_sample: dict[str, int] = {}
    for number, name in enumerate(names):
        for sample in label_map[name]:
            if sample in label_of_sample:
                raise ValueError(
                    f"{file}: sample {sample} is in classes {names[label_of_sample[sample]]} and "
                    f"{name}: one label a sample is read, take it out of one"
                )
            label_of_sample[sample] = number
    return label_of_sample


def _bands_of_sample(file: Path, names: Sequence[str]) -> Tensor:
    """Reads three bands of one sample as (3, h, w) uint8. names: in small letters."""
    import h5py

    try:
        with h5py.File(file, "r") as sample:
            stored_of_name = {
                name: [stored for stored in sample if _name_of_band(stored) == name]
                for name in names
            }
            if wrong := [name for name in names if len(stored_of_name[name]) != 1]:
                counts = ", ".join(f"{len(stored_of_name[name])} bands of {name}" for name in wrong)
                raise ValueError(
                    f"{file} has {counts} among {', '.join(sample)}: "
                    "exactly one of each is needed, of one date"
                )
            bands = [_band(sample, stored_of_name[name][0], file) for name in names]
    except (OSError, KeyError, RuntimeError) as error:  # what h5py raises on damaged files
        raise ValueError(
            f"{file} does not read as HDF5 ({error}): repair or replace it; "
            "images are never skipped in silence"
        ) from error
    if len({band.shape for band in bands}) > 1:
        raise ValueError(
            f"{file} has bands of shape {', '.join(str(band.shape) for band in bands)}: "
            "all must have one height and width"
        )
    pixels = np.stack(bands)
    has_fractions = pixels.dtype.kind == "f" and (pixels != pixels.round()).any()
    if pixels.min() < 0 or pixels.max() > 255 or has_fractions:
        raise ValueError(
            f"{file} holds values from {pixels.min()} to {pixels.max()} of type {pixels.dtype}: "
            "bands of whole numbers from 0 to 255 are read; other sensors need a scale of their own"
        )
    return torch.from_numpy(pixels.astype(np.uint8))


def _band(sample: h5py.File, name: str, file: Path) -> np.ndarray:
    """Reads one band (h, w) whose values lie in the file itself.

    HDF5 can take values from any other file: by links, by external storage, and by virtual data
    sets. A data set that was downloaded must not read what else is on the machine, nor ask for more
    memory than an image needs.
    """
    import h5py

    link, band = sample.get(name, getlink=True), sample.get(name)
    if not isinstance(link, h5py.HardLink) or not isinstance(band, h5py.Dataset):
        raise ValueError(
            f"{file}: band {name} is no array of this file but a link or a group. {FROM_OUTSIDE}"
        )
    if band.external or band.is_virtual:
        raise ValueError(f"{file}: band {name} takes its values from other files. {FROM_OUTSIDE}")
    if band.ndim != 2 or band.dtype.kind not in "uif":
        raise ValueError(
            f"{file}: band {name} holds {band.dtype} of shape {band.shape}, and numbers of a "
            "height and a width are read: convert it, or take the sample out"
        )
    if band.size > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{file}: band {name} has {band.shape[0]} x {band.shape[1]} pixels, more than the "
            f"{Image.MAX_IMAGE_PIXELS:,} that an image may have: cut it, or take the sample out"
        )
    return np.asarray(band)


def _name_of_band(name: str) -> str:
    """Takes number and date off a band's name: "04 - Red_2016-01-01" and "Red" are both "red"."""
    without_number = re.sub(r"^\d+\w? - ", "", name)
    return re.sub(r"_\d{4}-\d{2}-\d{2}.*$", "", without_number).strip().lower()


# ---------------------------------------------------------------- MIT Indoor


def mit_indoor(folder: Path) -> Read:
    """Reads MIT Indoor scenes (Quattoni & Torralba, CVPR 2009).

    It holds Images/CLASS/FILE.jpg with TrainImages.txt and TestImages.txt. There is no validation
    split; one is cut from training. Most of the published images are in neither list, and are not
    read. Raises ValueError for an empty or absent list, a file that is listed and absent, and one
    that is listed twice.
    """
    images_of_split = {split: _listed(folder, name) for split, name in LISTS.items()}
    if in_both := set(images_of_split["train"]) & set(images_of_split["test"]):
        raise ValueError(
            f"{folder}: {sorted(in_both)[0]} is in the training and in the test list: take it out "
            "of one"
        )
    # an image is listed as CLASS/FILE.jpg
    classes_of_split = {
        split: [image.split("/")[0] for image in images]
        for split, images in images_of_split.items()
    }
    names = sorted(set(classes_of_split["train"]))
    if untrained := set(classes_of_split["test"]) - set(names):
        raise ValueError(
            f"{folder / 'TestImages.txt'}: class {sorted(untrained)[0]} has no training image: "
            "list some in TrainImages.txt, or take the class out"
        )
    splits = {}
    for split, images in images_of_split.items():
        files = [folder / "Images" / image for image in images]
        labels = np.array([names.index(name) for name in classes_of_split[split]])
        splits[split] = rows_in_files(labels, files, picture)
    return splits, names


def _listed(folder: Path, name: str) -> list[str]:
    """Reads a list of images, all of which must be there."""
    if not (folder / name).is_file():
        raise ValueError(
            f"{folder} has no {name}: MIT Indoor comes with TrainImages.txt and TestImages.txt"
        )
    lines = [line.strip() for line in (folder / name).read_text().splitlines()]
    images = [line for line in lines if line]
    if not images:
        raise ValueError(
            f"{folder / name} lists no image: get it again, or list images as CLASS/FILE"
        )
    for image in images:
        parts = image.split("/")
        if len(parts) != 2 or "\\" in image or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{folder / name} lists {image}: images are listed as CLASS/FILE")
    if len(set(images)) < len(images):
        twice = next(image for image in images if images.count(image) > 1)
        raise ValueError(f"{folder / name} lists {twice} twice: take one line out")
    if absent := [image for image in images if not (folder / "Images" / image).is_file()]:
        raise ValueError(
            f"{folder / name} lists {absent[0]}, which is not in {folder / 'Images'}; "
            f"{len(absent)} such in all. Unpack the images again, or take the lines out"
        )
    return images
