"""Reads class folders: pictures in a folder a class, by one stated layout.

Where every top folder has the name of a split, the layout is SPLIT/CLASS/..., else CLASS/...; names
mean nothing else, and a picture may lie at any depth below its class. What begins with a dot is
not looked at. A file that is no picture is left alone; every picture is read, or an error names it.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from .pixels import opened
from .rows import SPLIT_OF_NAME, Read, Rows, picture, rows_in_files

READABLE = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .qoi "
    ".tga .tif .tiff .webp".split()
)
# pictures that a camera or a drawing program writes and Pillow does not read
UNREADABLE = frozenset(".arw .cr2 .cr3 .dng .heic .heif .jxl .nef .orf .raf .raw .rw2 .svg".split())
# what lies beside pictures; of other files the content decides
NO_PICTURES = frozenset(
    ".csv .db .gz .h5 .hdf5 .html .ini .json .jsonl .log .mat .md .npy .npz .parquet .pdf .pkl .pt "
    ".pth .py .rtf .safetensors .sh .tar .toml .tsv .txt .xml .yaml .yml .zip".split()
)
# what an archive's program, and a network disk for its thumbnails, add beside the folders
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}


@dataclass(frozen=True, order=True)
class Picture:
    """Holds the path of a picture, and the (device, inode) that tell files apart."""

    file: Path
    identity: tuple[int, int]


def class_folders(folder: Path) -> Read:
    """Reads the pictures of a folder: by split labels and decoder, then the names of the classes.

    The classes are those of the training split, by name in Unicode's composed form. Raises
    ValueError, naming the first file or folder, for a picture outside a class, one that is empty,
    of a kind that is not read, or a link to nothing; for one file that is found twice; for a folder
    without pictures, fewer than two classes, a class without a training picture, two folders of one
    split or of names that print alike, and a split beside folders that are none.
    """
    top = _folders_in(folder)
    splits = _folder_of_split(folder, top)
    files_of_split = {
        split: _files_by_class(of_split, top if of_split == folder else _folders_in(of_split))
        for split, of_split in splits.items()
    }
    names = sorted(files_of_split["train"])
    if len(names) < 2:
        raise ValueError(
            f"{splits['train']} has {len(names)} class folders ({', '.join(names) or 'none'}): "
            "at least two are needed, as in CLASS/picture.jpg or train/CLASS/picture.jpg"
        )
    _refuse_shared_files(files_of_split)
    read: dict[str, Rows] = {}
    for split, files_of_class in files_of_split.items():
        if untrained := sorted(set(files_of_class) - set(names)):
            raise ValueError(
                f"{splits[split] / untrained[0]}: class {untrained[0]} has no training picture; "
                f"classes of {splits['train']} are {', '.join(names[:10])}. Give it some, or move "
                "the folder out of the data set"
            )
        files = [each.file for name in names for each in files_of_class.get(name, ())]
        sizes = [len(files_of_class.get(name, ())) for name in names]
        read[split] = rows_in_files(np.repeat(np.arange(len(names)), sizes), files, picture)
    return read, names


def _folder_of_split(folder: Path, top: list[Path]) -> dict[str, Path]:
    """{split: its folder}; the whole folder is the training split where the layout is CLASS/..."""
    named = [sub for sub in top if sub.name.lower() in SPLIT_OF_NAME]
    if not named or len(named) < len(top):
        _refuse_splits_beside_classes(folder, top, named)
        return {"train": folder}
    splits: dict[str, Path] = {}
    for sub in named:
        split = SPLIT_OF_NAME[sub.name.lower()]
        if split in splits:
            raise ValueError(
                f"{splits[split]} and {sub} are both the {split} split: put their classes together"
            )
        splits[split] = sub
    if "train" not in splits:
        raise ValueError(
            f"{folder} has the splits {', '.join(sub.name for sub in top)} and no train: "
            "name the folder of the training pictures train"
        )
    if stray := next(_pictures_of(folder, deep=False), None):
        raise ValueError(_outside(stray.file, "SPLIT/CLASS/picture"))
    return splits


def _refuse_splits_beside_classes(folder: Path, top: list[Path], named: list[Path]) -> None:
    """Raises ValueError where split folders with classes of their own lie beside other folders: two
    of them, or one whose classes are folders in another, too.

    Read as classes, the pictures would be labelled train and test, or train and holdout.
    """
    of_classes = [
        sub
        for sub in named
        if next(_pictures_of(sub, deep=False), None) is None and _folders_in(sub)
    ]
    others = [sub for sub in top if sub not in named]
    if len({SPLIT_OF_NAME[sub.name.lower()] for sub in of_classes}) > 1:
        other = others[0]
        raise ValueError(
            f"{folder} holds split folders with classes in them "
            f"({', '.join(sub.name for sub in of_classes)}) and {other.name} beside them: "
            "either every top folder is a split (train, val, test), or every one is a class. "
            f"Move {other.name} away, or into a split"
        )
    for split in of_classes:
        classes = {sub.name for sub in _folders_in(split)}
        for other in others:
            if shared := sorted(classes & {sub.name for sub in _folders_in(other)}):
                raise ValueError(
                    f"{split} and {other} both hold a folder {shared[0]}: they look like two "
                    f"splits, and {other.name} is no name of one. Name it val or test, or move it "
                    f"away; where {split.name} is a class, put its pictures into it without "
                    "folders, or give it another name"
                )


def _files_by_class(folder: Path, classes: list[Path]) -> dict[str, list[Picture]]:
    """{class: its pictures, sorted} of one split."""
    if stray := next(_pictures_of(folder, deep=False), None):
        raise ValueError(_outside(stray.file, "CLASS/picture"))
    files_of_class = {}
    for of_class in classes:
        files = sorted(_pictures_of(of_class, deep=True))
        if not files:
            raise ValueError(
                f"{of_class} holds no picture, and every folder in {folder} is a class: remove it, "
                "or put its pictures there"
            )
        # one system writes é as one character and another as two: equal in print
        name = unicodedata.normalize("NFC", of_class.name)
        if name in files_of_class:
            raise ValueError(
                f"{folder} holds two folders whose names print alike, {name} "
                f"({ascii(of_class.name)} is the second): put their pictures together"
            )
        files_of_class[name] = files
    return files_of_class


def _outside(stray: Path, layout: str) -> str:
    return (
        f"{stray} lies in no class folder, so it has no label: the layout is {layout}. "
        "Move it into the folder of its class, or out of the data set"
    )


def _refuse_shared_files(files_of_split: dict[str, dict[str, list[Picture]]]) -> None:
    """Raises ValueError if one file is found at two places, in two splits or in one."""
    first_of: dict[tuple[int, int], Path] = {}
    for files_of_class in files_of_split.values():
        for each in chain.from_iterable(files_of_class.values()):
            first = first_of.setdefault(each.identity, each.file)
            if each.identity[1] and first is not each.file:  # some network disks number no files
                raise ValueError(
                    f"{each.file} and {first} are one and the same file (a link): it would be "
                    "loaded twice. Remove one"
                )


def _folders_in(folder: Path) -> list[Path]:
    """Lists the folders in a folder, sorted, without hidden ones; links are followed."""
    return sorted(sub for sub in folder.iterdir() if _is_looked_at(sub.name) and sub.is_dir())


def _is_looked_at(name: str) -> bool:
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


def _pictures_of(folder: Path, deep: bool) -> Iterator[Picture]:
    """Yields the pictures in a folder, and with `deep` in all folders below it.

    Raises ValueError for a picture that cannot be read by its kind, its size or its link, for a
    folder that cannot be opened, and for links that lead in a circle.
    """
    first_of: dict[str, str] = {}
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        first = first_of.setdefault(os.path.realpath(where), where)
        if first != where:
            raise ValueError(
                f"{where} and {first} are one and the same folder (a link): its pictures would be "
                "loaded twice. Remove one"
            )
        # in place: os.walk goes down only what is left here
        folders[:] = sorted(name for name in folders if deep and _is_looked_at(name))
        for name in sorted(names):
            if _is_looked_at(name) and (found := _picture_at(Path(where, name))):
                yield found


def _raise(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _picture_at(file: Path) -> Picture | None:
    """Tells a picture from other files, by its ending and, where that says nothing, its content."""
    suffix = file.suffix.lower()
    if suffix in NO_PICTURES:
        return None
    if suffix in UNREADABLE:
        raise ValueError(
            f"{file}: pictures of kind {suffix} are not read. Convert it, to PNG or JPEG for "
            "example, or move it out of the data set"
        )
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(
            f"{file} cannot be looked at ({error.strerror}): a link to a file that is not there?"
        ) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer for ever
        if suffix in READABLE:
            raise ValueError(f"{file} is a pipe, a socket or a device and no picture: remove it")
        return None
    if suffix not in READABLE and not _looks_like_picture(file):
        return None
    if not status.st_size:
        raise ValueError(f"{file} is empty: replace it, or remove it")
    return Picture(file, (status.st_dev, status.st_ino))


def _looks_like_picture(file: Path) -> bool:
    try:
        with opened(file):
            return True
    except (OSError, SyntaxError, ValueError):  # what Pillow raises; UnidentifiedImageError is one
        return False
