"""Reads CIFAR-10 and CIFAR-100 as their authors publish them, in the binary version.

A record is a label a byte (CIFAR-10: one; CIFAR-100: the coarse one, then the fine one) and 3,072
pixels: 1,024 red, 1,024 green, 1,024 blue, row by row. Labels are read at once, images when they
are asked for. The Python version is pickles, which can run code, and is refused.

Axis letters: **n** images of a split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .rows import Read, Rows

SIDE = 32
PIXELS = 3 * SIDE**2


@dataclass(frozen=True)
class Version:
    """Says what lies in a folder: the files of each split, and of each label its names.

    names_of_label: in the order of the labels' bytes.
    """

    files_of_split: dict[str, tuple[str, ...]]
    names_of_label: dict[str, str]


CIFAR_10 = Version(
    {
        "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("test_batch.bin",),
    },
    {"label": "batches.meta.txt"},
)
CIFAR_100 = Version(
    {"train": ("train.bin",), "test": ("test.bin",)},
    {"coarse_label": "coarse_label_names.txt", "fine_label": "fine_label_names.txt"},
)
# files of the Python version, which nothing else has under these names
PICKLES = ({"data_batch_1", "batches.meta"}, {"train", "meta"})


def is_binary(folder: Path) -> bool:
    """Says whether a folder holds files of the binary version; refuses the Python one.

    Raises ValueError for a folder of pickles.
    """
    for names in PICKLES:
        if all((folder / name).is_file() for name in names):
            raise ValueError(
                f"{folder} is the Python version of CIFAR, whose files are pickles, and a pickle "
                "can run code: take the binary version (cifar-10-binary.tar.gz, "
                "cifar-100-binary.tar.gz), or the parquet files of the hub"
            )
    return _version(folder) is not None


def _version(folder: Path) -> Version | None:
    for version in (CIFAR_10, CIFAR_100):
        files = [name for names in version.files_of_split.values() for name in names]
        if any((folder / name).is_file() for name in files):
            return version
    return None


def binary(folder: Path, label: str) -> Read:
    """Reads the binary version: by split labels and decoder, then the names of the classes.

    label: "label" of CIFAR-10; "fine_label" or "coarse_label" of CIFAR-100, as the hub names them.
    Raises ValueError for another one, a file that is absent, one too many, one that is half copied,
    a label without a name, and classes of unequal numbers of images, which no CIFAR has.
    """
    version = _version(folder)
    labels = list(version.names_of_label)
    if label not in labels:
        raise ValueError(
            f"{folder} has no label {label!r}; it has {', '.join(labels)}. Give one with label="
        )
    _check_files(folder, version)
    names = _names(folder / version.names_of_label[label])
    splits = {}
    for split, files in version.files_of_split.items():
        paths = [folder / name for name in files]
        at = labels.index(label)
        parts = [_records(path, len(labels))[:, at] for path in paths]
        numbers = np.concatenate(parts).astype(np.int64)
        _check_labels(numbers, names, f"{folder}, {', '.join(files)}")
        splits[split] = _rows(numbers, paths, [len(part) for part in parts], len(labels))
    return splits, names


def _check_files(folder: Path, version: Version) -> None:
    known = [name for names in version.files_of_split.values() for name in names]
    if absent := [name for name in known if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has no {absent[0]}: it needs {', '.join(known)}. Unpack the archive again"
        )
    if surplus := sorted(file.name for file in folder.glob("*.bin") if file.name not in known):
        raise ValueError(
            f"{folder} has {surplus[0]}, which CIFAR has not: its files are {', '.join(known)}. "
            "Move it away"
        )


def _names(file: Path) -> list[str]:
    """Reads the names of classes, one a line."""
    if not file.is_file():
        raise ValueError(f"{file} is not there, which names the classes: unpack the archive again")
    names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if len(set(names)) < max(len(names), 2):
        raise ValueError(
            f"{file} has {len(names)} names, {len(set(names))} of them different: it needs one a "
            "line and class. Unpack the archive again"
        )
    return names


def _records(file: Path, labels: int) -> np.ndarray:
    """Maps the records of a file: (n, labels + 3072) uint8."""
    size, length = file.stat().st_size, labels + PIXELS
    if not size or size % length:
        raise ValueError(
            f"{file} has {size:,} bytes, and a record {length:,}: it is half copied or another "
            "file. Unpack the archive again"
        )
    return np.memmap(file, np.uint8, "r").reshape(-1, length)


def _check_labels(numbers: np.ndarray, names: list[str], where: str) -> None:
    beyond = np.flatnonzero(numbers >= len(names))
    if len(beyond):
        raise ValueError(
            f"{where}, row {beyond[0]}: label {numbers[beyond[0]]} is none of the {len(names)} "
            "classes that are named. Unpack the archive again"
        )
    counts = np.bincount(numbers, minlength=len(names))
    if counts.min() < counts.max():
        few, most = counts.argmin(), counts.argmax()
        raise ValueError(
            f"{where}: class {names[few]} has {counts[few]} images and {names[most]} "
            f"{counts[most]}, and all classes of CIFAR have as many: the files are not whole. "
            "Unpack the archive again"
        )


def _rows(numbers: np.ndarray, files: list[Path], sizes: list[int], labels: int) -> Rows:
    """Gives the rows of a split, file by file. sizes: records of each file."""
    ends = np.cumsum(sizes)

    def place(row: int) -> tuple[Path, int, int]:
        """Finds the file of a row, its number in it, and how many labels a record has."""
        file = int(np.searchsorted(ends, row, side="right"))
        return files[file], row - int(ends[file]) + sizes[file], labels

    return Rows(
        numbers, lambda row: _image(*place(row)), lambda row: _record(*place(row)).tobytes()
    )


def _image(file: Path, number: int, labels: int) -> Tensor:
    """Reads one image, (3, 32, 32) uint8."""
    return torch.from_numpy(_record(file, number, labels)[labels:]).view(3, SIDE, SIDE)


def _record(file: Path, number: int, labels: int) -> np.ndarray:
    length = labels + PIXELS
    return np.fromfile(file, np.uint8, length, offset=number * length)
