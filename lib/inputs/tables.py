"""Reads data sets in tables: parquet files of a folder, or the hub's copy.

Class names decide: each file lists its own, and a label is the class of that name, not of that
number. Only the splits train, val and test are looked at. Labels are read at once; images stay in
the table and are decoded on demand.

Axis letters: **n** rows of a split.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import paths
from .encoded import rows_in_table
from .label_columns import Column, label_column, labels_by_name
from .rows import SPLIT_OF_NAME, Read

if TYPE_CHECKING:
    import datasets

# SPLIT.parquet, or a part of it as the hub names them: SPLIT-00000-of-00002.parquet
FILE_NAME = re.compile(
    r"(?P<split>[^-]+?)(-(?P<part>\d{5})-of-(?P<parts>\d{5})(-\w+)?)?\.parquet", re.IGNORECASE
)


def folder_of_tables(folder: Path) -> Path | None:
    """Finds the folder with the parquet files of a data set: itself, or `data` in it; None if none.

    Raises ValueError for parquet files in both, and for some that lie deeper.
    """
    places = [place for place in (folder, folder / "data") if _parquet(place)]
    if len(places) > 1:
        raise ValueError(
            f"{folder} has parquet files of its own and in data: keep those that are the data set"
        )
    deeper = (file for file in folder.glob("*/*.*") if file.suffix.lower() == ".parquet")
    if not places and (deeper := next(deeper, None)):
        raise ValueError(
            f"{deeper} is not looked at: parquet files lie in {folder} or in {folder / 'data'}, "
            "named SPLIT.parquet or SPLIT-00000-of-00002.parquet"
        )
    return places[0] if places else None


def _parquet(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (f for f in folder.iterdir() if f.suffix.lower() == ".parquet")
    return sorted(f for f in files if f.name[0] != ".")


def parquet_files(folder: Path, label: str) -> Read:
    """Reads the parquet files of a folder: by split labels and decoder, then the names of classes.

    label: the column of labels. Raises ValueError, naming the file and where it can the row, for a
    part that is absent, no split named train, a file that does not read, no such column or one that
    does not hold one class a row, fewer than two classes in training, a class that training does
    not know, and no column of images or several.
    """
    files_of_split = _files_of_split(folder)
    columns = {
        split: [_label_column(file, label) for file in files]
        for split, files in files_of_split.items()
    }
    labels_of_split, names = labels_by_name(columns)
    if empty := [split for split, labels in labels_of_split.items() if not len(labels)]:
        raise ValueError(
            f"{folder}, split {empty[0]}: there is no image in it; add some, or take its files away"
        )
    files_of_split = {split: list(map(str, files)) for split, files in files_of_split.items()}
    image = _image_column(Path(files_of_split["train"][0]))
    read = {}
    for split, table in _tables(files_of_split, image).items():
        read[split] = rows_in_table(
            labels_of_split[split], table, image, f"{folder}, split {split}", [folder]
        )
    return read, names


def _files_of_split(folder: Path) -> dict[str, list[Path]]:
    files_of_split: dict[str, list[Path]] = {}
    parts_of_split: dict[str, set[tuple[int, int]]] = {}
    other = []
    for file in _parquet(folder):
        match = FILE_NAME.fullmatch(file.name)
        split = SPLIT_OF_NAME.get(match["split"].lower()) if match else None
        if split is None:
            other.append(file)
            continue
        files_of_split.setdefault(split, []).append(file)
        if match["part"]:
            parts_of_split.setdefault(split, set()).add((int(match["part"]), int(match["parts"])))
    for file in other:
        # anything else that begins like a split may be a part of it: not left out in silence
        if any(file.name.lower().startswith(name) for name in SPLIT_OF_NAME):
            raise ValueError(
                f"{file} is not read: files are named SPLIT.parquet or "
                "SPLIT-00000-of-00002.parquet, with SPLIT one of train, validation, test. "
                "Rename it, or move it away"
            )
    if "train" not in files_of_split:
        names = ", ".join(file.name for file in _parquet(folder))
        raise ValueError(
            f"{folder} has no split named train, only {names}: name that file train.parquet"
        )
    for split, parts in parts_of_split.items():
        _refuse_incomplete(folder, split, files_of_split[split], parts)
    return files_of_split


def _refuse_incomplete(
    folder: Path, split: str, files: Sequence[Path], parts: set[tuple[int, int]]
) -> None:
    """Raises ValueError unless the files of a split are all its parts and nothing else.

    parts: (number, how many) of each file whose name has them.
    """
    totals = sorted({total for _, total in parts})
    absent = sorted(set(range(totals[-1])) - {number for number, _ in parts})
    if len(totals) == 1 and not absent and len(files) == len(parts):
        return
    reason = f"part {absent[0]} of {totals[-1]} is not there" if absent else "they overlap"
    names = ", ".join(file.name for file in files[:4])
    raise ValueError(
        f"{folder}: the files of split {split} are no whole set ({names}): {reason}. "
        "Get the data set again, or move away what does not belong to it"
    )


def hub_copy(name: str, label: str) -> Read:
    """Reads the hub's copy of a data set, hub:owner/name; arguments and errors as `parquet_files`.

    Raises FileNotFoundError if it is neither in the cache nor delivered.
    """
    import datasets
    from huggingface_hub import constants

    cache = paths.cache() / "datasets"
    try:
        delivered = datasets.load_dataset(name.removeprefix("hub:"), cache_dir=str(cache))
    except Exception as error:  # the hub client raises many kinds, from DNS to HTTP to JSON
        raise FileNotFoundError(
            f"{name} is not in the cache ({cache}) and the hub did not deliver it "
            f"({type(error).__name__}: {error}). Either run once with network, or put its parquet "
            f"files into MOE_DATA/{name.removeprefix('hub:').rpartition('/')[2]}"
        ) from error
    tables: dict[str, datasets.Dataset] = {}
    for given, table in delivered.items():
        split = SPLIT_OF_NAME.get(given.lower())
        if split in tables:
            raise ValueError(f"{name} has two {split} splits, {given!r} too: copy one to MOE_DATA")
        if split:
            tables[split] = table
    if "train" not in tables:
        raise ValueError(f"data set {name!r} has no split named train, only {', '.join(delivered)}")
    columns = {}
    for split, table in tables.items():
        where = f"{name}, split {split}"
        if label not in table.features:
            raise ValueError(_no_column(where, label, list(table.features)))
        values = table.data.column(label)
        columns[split] = [
            label_column(where, values, getattr(table.features[label], "names", None))
        ]
    labels_of_split, names = labels_by_name(columns)
    read = {}
    for split, table in tables.items():
        where = f"{name}, split {split}"
        images = [c for c, of in table.features.items() if isinstance(of, datasets.Image)]
        image = _only_one(images, where, list(table.features))
        # a set of single files stays in the hub's own cache
        folders = [cache, Path(constants.HF_HUB_CACHE)]
        read[split] = rows_in_table(labels_of_split[split], table, image, where, folders)
    return read, names


# ---------------------------------------------------------------- labels


def _label_column(file: Path, label: str) -> Column:
    """Reads the label column of a parquet file, with the class names that the file gives."""
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        schema = parquet.read_schema(file)
        if label not in schema.names:
            raise ValueError(_no_column(str(file), label, schema.names))
        values = parquet.read_table(file, columns=[label]).column(label)
    except (ArrowException, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as parquet: {error}. Get it again, or write it anew"
        ) from error
    feature = datasets.Features.from_arrow_schema(schema)[label]
    return label_column(str(file), values, getattr(feature, "names", None))


def _no_column(where: str, label: str, columns: Sequence[str]) -> str:
    return (
        f"{where} has no label column {label!r}; its columns are {', '.join(columns)}. Give the "
        "one of the classes with label="
    )


# ---------------------------------------------------------------- images


def _image_column(file: Path) -> str:
    """Names the column of a parquet file that holds encoded images."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    schema = parquet.read_schema(file)
    features = datasets.Features.from_arrow_schema(schema)
    images = []
    for column in schema.names:
        kind = schema.field(column).type
        fields = {field.name for field in kind} if pyarrow.types.is_struct(kind) else set()
        # the second form is what a program that knows nothing of `datasets` leaves of the first
        if isinstance(features[column], datasets.Image) or fields == {"bytes", "path"}:
            images.append(column)
    return _only_one(images, str(file), schema.names)


def _only_one(images: Sequence[str], where: str, columns: Sequence[str]) -> str:
    """Gives the one column of images; ValueError where there is none, or one of several to choose.

    where: begins the message; columns: all that there are.
    """
    if len(images) > 1:
        raise ValueError(
            f"{where}: {len(images)} columns hold images, {', '.join(images)}, and nothing says "
            "which are to be classified: write the table without the others"
        )
    if images:
        return images[0]
    raise ValueError(
        f"{where}: no image column among {', '.join(columns)}. Images are structs of bytes and "
        "path, as the package datasets writes a column of type Image"
    )


def _identity(files_of_split: dict[str, list[str]]) -> str:
    """Names the files as they are now, for the cache of what was made of them.

    The library goes by name and time of change, which is not enough (`paths.marks_of`).
    """
    content = []
    for split, files in sorted(files_of_split.items()):
        for file in files:
            content.append(f"{split} {file} {paths.marks_of(os.stat(file))}")
    return hashlib.sha256("\n".join(content).encode(errors="surrogatepass")).hexdigest()[:16]


def _tables(files_of_split: dict[str, list[str]], image: str) -> datasets.DatasetDict:
    """Opens the image column of the files, as tables on disk."""
    import datasets

    try:
        return datasets.load_dataset(
            "parquet",
            # the library reads names as patterns
            data_files={
                split: list(map(glob.escape, files)) for split, files in files_of_split.items()
            },
            columns=[image],
            features=datasets.Features({image: datasets.Image()}),
            cache_dir=str(paths.cache() / "datasets" / _identity(files_of_split)),
        )
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        first = next(iter(files_of_split["train"]))
        raise ValueError(
            f"{Path(first).parent} cannot be read: {error.__cause__ or error}. Its files need the "
            f"same image column {image!r}; get them again, or write them anew"
        ) from error
