"""Reads a data folder by the layout that its files have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import archives, cifar, folders, imagenet, tables
from .rows import Read


def read_folder(folder: Path, label: str, bands: tuple[str, ...] | None = None) -> Read:
    """Reads a folder of tables, of an archive's layout, or of classes.

    label, bands: as in `DataSpec`. Raises ValueError as the reader of its layout does, and for a
    label or bands that it has not.
    """
    read = archives.reader(folder)
    if read is archives.geobench:
        read = partial(archives.geobench, bands=bands or archives.COLOURS)
    elif bands is not None:
        raise ValueError(
            f"data set {folder.name} has no bands={bands}: only GEO-Bench samples have bands by "
            "name, others are in colour. Leave bands at None"
        )
    if read is None and cifar.is_binary(folder):
        return cifar.binary(folder, label)
    of_tables = None if read else tables.folder_of_tables(folder)
    if of_tables:
        return tables.parquet_files(of_tables, label)
    if label != "label":
        raise ValueError(
            f"data set {folder.name} has no label column {label!r}: a folder of its kind has one, "
            "named label"
        )
    return (read or _of_classes(folder))(folder)


def _of_classes(folder: Path) -> Callable[[Path], Read]:
    return imagenet.read if imagenet.is_imagenet(folder) else folders.class_folders
