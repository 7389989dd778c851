"""Numbers the labels of tables by the names of their classes.

Class names decide: each file lists its own, and a label is the class of that name, not of that
number. Texts are compared in Unicode's composed form.

Axis letters: **n** rows of a split.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Column:
    """Holds the label column of one file or split.

    where: begins messages about it; names: of its classes by number, None for a plain column whose
    values name the classes; values: (n,) numbers of classes, or the values.
    """

    where: str
    names: list[str] | None
    values: list


def labels_by_name(
    columns_of_split: dict[str, list[Column]],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Numbers the labels of all columns by one list of class names, which it returns, too.

    The list is that of the first column of the training split, with names that only later training
    columns have at its end; where columns are plain, it is the training values in order. Raises
    ValueError for fewer than two classes with training rows and, with the row, for a label of
    another split that is none of these.
    """
    training = columns_of_split["train"]
    has_names = [column for column in training if column.names is not None]
    if has_names:
        classes = list(dict.fromkeys(name for column in has_names for name in column.names))
    else:
        classes = _in_order({value for column in training for value in column.values}, training)
    number_of = {value: number for number, value in enumerate(classes)}
    of_training = _all_numbered(training, number_of)
    trained = set(of_training.tolist())
    if len(trained) == 1:
        raise ValueError(
            f"{training[0].where}: all training rows are of the one class "
            f"{classes[trained.pop()]!r}, and at least two are needed"
        )
    # without any training row, whoever reads the images says so
    known = {
        value: number for value, number in number_of.items() if number in trained or not trained
    }
    others = {
        split: _all_numbered(columns, known)
        for split, columns in columns_of_split.items()
        if split != "train"
    }
    return {"train": of_training} | others, list(map(str, classes))


def _all_numbered(columns: Sequence[Column], number_of: dict[Any, int]) -> np.ndarray:
    numbers = [number for column in columns for number in _numbered(column, number_of)]
    return np.array(numbers, dtype=np.int64)


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


def label_column(where: str, values: pyarrow.ChunkedArray, names: list[str] | None) -> Column:
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
            pyarrow.types.is_string_view,
        )
    ):
        raise ValueError(
            f"{where}: the label column holds {kind}, and a label is one whole number or one text "
            "a row. Give the column of the classes with label="
        )
    listed = _composed(values.to_pylist(), where)
    names = names if names is None else _composed(names, where)
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


def _composed(values: list, where: str) -> list:
    """Writes texts in Unicode's composed form: one system writes é as one character and another as
    two. ValueError where both stand in one column, which print alike and may be two classes."""
    texts = {value for value in values if isinstance(value, str)}
    form_of = {text: unicodedata.normalize("NFC", text) for text in texts}
    spelt = {form: value for value, form in form_of.items()}
    if len(spelt) < len(form_of):
        value = next(value for value, form in form_of.items() if spelt[form] != value)
        raise ValueError(
            f"{where} has two classes that print alike, {ascii(value)} and "
            f"{ascii(spelt[form_of[value]])}: write them as one, or rename one"
        )
    return [form_of.get(value, value) for value in values]
