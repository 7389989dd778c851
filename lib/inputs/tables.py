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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import paths
from .encoded import rows_in_table
from .rows import SPLIT_OF_NAME, Read

if TYPE_CHECKING:
    import datasets
    import pyarrow

# SPLIT.parquet, or a part of it as the hub names them: SPLIT-00000-of-00002.parquet
FILE_NAME = re.compile(r"(?P<split>[^-]+?)(-(?P<part>\d{5})-of-(?P<parts>\d{5})(-\w+)?)?\.parquet")


@dataclass(frozen=True)
class Column:
    """Holds the label column of one file or split.

    where: begins messages about it; names: of its classes by number, None for a plain column whose
    values name the classes; values: (n,) numbers of classes, or the values.
    """

    where: str
    names: list[str] | None
    values: list


def folder_of_tables(folder: Path) -> Path | None:
    """Finds the folder with the parquet files of a data set: itself, or `data` in it; None if none.

    Raises ValueError for parquet files in both, and for some that lie deeper.
    """
    places = [place for place in (folder, folder / "data") if _parquet(place)]
    if len(places) > 1:
        raise ValueError(
            f"{folder} has parquet files of its own and in data: keep those that are the data set"
        )
    if not places and (deeper := next(folder.glob("*/*.parquet"), None)):
        raise ValueError(
            f"{deeper} is not looked at: parquet files lie in {folder} or in {folder / 'data'}, "
            "named SPLIT.parquet or SPLIT-00000-of-00002.parquet"
        )
    return places[0] if places else None


def _parquet(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.suffix == ".parquet" and f.name[0] != ".")


def parquet_files(folder: Path, label: str) -> Read:
    """Reads the parquet files of a folder: by split labels and decoder, then the names of classes.

    label: the column of labels. Raises ValueError, naming the file and where it can the row, for a
    part that is absent, no split named train, a file that does not read, no such column or one that
    does not hold one class a row, and a class that training does not know.
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
            labels_of_split[split], table, image, f"{folder}, split {split}"
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
        columns[split] = [_column(where, values, getattr(table.features[label], "names", None))]
    labels_of_split, names = labels_by_name(columns)
    read = {}
    for split, table in tables.items():
        where = f"{name}, split {split}"
        images = [c for c, of in table.features.items() if isinstance(of, datasets.Image)]
        if not images:
            raise ValueError(_no_images(where, list(table.features)))
        read[split] = rows_in_table(labels_of_split[split], table, images[0], where)
    return read, names


# ---------------------------------------------------------------- labels


def labels_by_name(
    columns_of_split: dict[str, list[Column]],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Numbers the labels of all columns by one list of class names, which it returns, too.

    The list is that of the first column of the training split, with names that only later training
    columns have at its end; where columns are plain, it is the training values in order. Raises
    ValueError, with the row, for a label that is not in it.
    """
    training = columns_of_split["train"]
    has_names = [column for column in training if column.names is not None]
    if has_names:
        classes = list(dict.fromkeys(name for column in has_names for name in column.names))
    else:
        classes = _in_order({value for column in training for value in column.values}, training)
    number_of = {value: number for number, value in enumerate(classes)}
    labels_of_split = {
        split: np.array(
            [label for column in columns for label in _numbered(column, number_of)],
            dtype=np.int64,
        )
        for split, columns in columns_of_split.items()
    }
    return labels_of_split, list(map(str, classes))


def _in_order(values: set, columns: Sequence[Column]) -> list:
    try:
        return sorted(values)
    except TypeError as error:  # numbers in one file, text in another
        kinds = {
            type(column.values[0]).__name__: column.where for column in columns if column.values
        }
        listed = " and ".join(f"{kind} in {where}" for kind, where in kinds.items())
        raise ValueError(
            f"labels are {listed}: all files need labels of one type, whole numbers or text"
        ) from error


def _numbered(column: Column, number_of: dict[Any, int]) -> list[int]:
    """Gives the class of each row of a column, by its name."""
    values = column.values
    if column.names is not None:
        values = [column.names[value] for value in values]
    for row, value in enumerate(values):
        if value not in number_of:
            listed = ", ".join(map(str, list(number_of)[:10]))
            raise ValueError(
                f"{column.where}, row {row}: {value!r} is no class of the training split, whose "
                f"classes are {listed}{', ...' if len(number_of) > 10 else ''} (compared by name). "
                "Give it training images, or take the row out"
            )
    return [number_of[value] for value in values]


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
    return _column(str(file), values, getattr(feature, "names", None))


def _no_column(where: str, label: str, columns: Sequence[str]) -> str:
    return (
        f"{where} has no label column {label!r}; its columns are {', '.join(columns)}. Give the "
        "one of the classes with label="
    )


def _column(where: str, values: pyarrow.ChunkedArray, names: list[str] | None) -> Column:
    """Checks that a column holds one class a row. where: begins the messages of ValueErrors."""
    import pyarrow

    kind = values.type
    if pyarrow.types.is_dictionary(kind):  # what pandas writes for categories
        values = pyarrow.chunked_array([chunk.dictionary_decode() for chunk in values.chunks])
        kind = kind.value_type
    if not any(
        check(kind)
        for check in (
            pyarrow.types.is_integer,
            pyarrow.types.is_boolean,
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
        )
    ):
        raise ValueError(
            f"{where}: the label column holds {kind}, and a label is one whole number or one text "
            "a row. Give the column of the classes with label="
        )
    listed = values.to_pylist()
    if None in listed:
        raise ValueError(
            f"{where}, row {listed.index(None)} has no label: label it, or remove the row"
        )
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where} gives two classes the name {twice!r}: rename one")
    for row, value in enumerate(listed if names is not None else ()):
        if not 0 <= value < len(names):
            raise ValueError(
                f"{where}, row {row}: label {value} is none of its {len(names)} classes, which "
                "are numbered from 0; -1 stands for no label. Label it, or remove the row"
            )
    return Column(where, names, listed)


# ---------------------------------------------------------------- images


def _image_column(file: Path) -> str:
    """Names the first column of a parquet file that holds encoded images."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    schema = parquet.read_schema(file)
    features = datasets.Features.from_arrow_schema(schema)
    for column in schema.names:
        kind = schema.field(column).type
        fields = {field.name for field in kind} if pyarrow.types.is_struct(kind) else set()
        # the second form is what a program that knows nothing of `datasets` leaves of the first
        if isinstance(features[column], datasets.Image) or fields == {"bytes", "path"}:
            return column
    raise ValueError(_no_images(str(file), schema.names))


def _no_images(where: str, columns: Sequence[str]) -> str:
    return (
        f"{where}: no image column among {', '.join(columns)}. Images are structs of bytes and "
        "path, as the package datasets writes a column of type Image"
    )


def _identity(files_of_split: dict[str, list[str]]) -> str:
    """Names the files as they are now, for the cache of what was made of them.

    The library goes by name and time of change, and a copy may keep the time of what it replaces;
    a file's number and the time of change of its entry it cannot keep.
    """
    content = []
    for split, files in sorted(files_of_split.items()):
        for file in files:
            status = os.stat(file)
            numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            content.append(f"{split} {file} {numbers}")
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
