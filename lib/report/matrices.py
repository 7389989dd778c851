"""Draws a printed table in its own shape: small matrices, one a source, below each other.

For tables with one number for each combination of settings: all settings but the last go down, the
last goes across. A cell is a number, an Interval (its mean, and below it half its width and n), or
None (no value).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..verdicts.stats import Interval
from .tables import Notes, Table, folded, in_figure

__all__ = ["Matrices", "Matrix", "matrices"]

Value = float | Interval | None


@dataclass(frozen=True)
class Matrix:
    """Is one source of the table.

    values: {settings of the cell, the one that goes across last: value}; rows and columns have the
    order in which they first come. signed: whether numbers have a plus or minus, as differences do.
    is_planned: whether a value that is None waits for a record; its cell then has a mark. A cell
    stays blank otherwise, and where values do not have it. folded: whether a click is needed to see
    the matrix.
    """

    title: str
    values: Mapping[tuple[Any, ...], Value]
    signed: bool = False
    is_planned: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Matrices:
    """Holds formatted matrices, ready to be displayed. The title of each is its table's caption.

    is_folded: one a table.
    """

    tables: tuple[Table, ...]
    is_folded: tuple[bool, ...]
    caption: str
    notes: tuple[str, ...] = ()

    @property
    def html(self) -> str:
        """Writes the matrices between their common caption and notes."""
        parts = zip(self.tables, self.is_folded, strict=True)
        return in_figure(self.caption, "".join(_part(*part) for part in parts), self.notes)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        frames = [table.frame.replace("\n", " ", regex=True) for table in self.tables]
        texts = [
            f"{table.caption}\n{frame.to_string(index=False)}"
            for table, frame in zip(self.tables, frames, strict=True)
        ]
        return "\n".join([self.caption, *texts, *self.notes])


def matrices(
    parts: Sequence[Matrix],
    settings: Sequence[str],
    *,
    caption: str,
    decimals: int = 1,
    notes: Sequence[str] = (),
) -> Matrices:
    """Makes matrices of the same settings.

        matrices(
            [
                Matrix("published", {("no shared", 2, 1): 91.4, ("no shared", 2, 12): 91.2}),
                Matrix("reproduced", {("no shared", 2, 1): accuracy_interval(records), ...}),
            ],
            ("arm", "N", "L"),
            caption="Top-1 (%) over arm, N and L.",
        )

    settings: names of the settings, the one that goes across last.
    """
    below = Notes()
    tables = tuple(Table(_frame(part, settings, decimals, below), part.title) for part in parts)
    half = ("± is half the width of the interval.",) if below.interval_methods else ()
    is_folded = tuple(part.folded for part in parts)
    return Matrices(tables, is_folded, caption, (*notes, *half, *below.lines()))


def _frame(part: Matrix, settings: Sequence[str], decimals: int, below: Notes) -> pd.DataFrame:
    """Writes the cells of one matrix: a row for each combination of all settings but the last."""
    *names, across = settings
    columns = list(dict.fromkeys(cell[-1] for cell in part.values))
    rows = []
    for row in dict.fromkeys(cell[:-1] for cell in part.values):
        cells = {
            f"{across}={column}": _text(part, (*row, column), decimals, below) for column in columns
        }
        rows.append(dict(zip(names, map(str, row), strict=True)) | cells)
    return pd.DataFrame(rows, dtype=object)


def _text(part: Matrix, cell: tuple[Any, ...], decimals: int, below: Notes) -> str:
    """Writes a cell: 57.2, or 57.2 with ±1.1, n=3 below it, or n=1 where there is no interval."""
    value = part.values.get(cell)
    if value is None:
        return below.missing() if part.is_planned and cell in part.values else ""
    below.interval(value)
    mean = value.mean if isinstance(value, Interval) else value
    # + 0.0 makes 0.0 of -0.0, whose sign means nothing
    text = f"{round(mean, decimals) + 0.0:{'+' if part.signed else ''}.{decimals}f}"
    if not isinstance(value, Interval):
        return text
    if value.low is None:
        return f"{text}\nn={value.n}"
    return f"{text}\n±{(value.high - value.low) / 2:.{decimals}f}, n={value.n}"


def _part(table: Table, is_folded: bool) -> str:
    title = html.escape(table.caption)
    if is_folded:
        return folded(title, table.body)
    return f'<div style="font-weight:600;margin-top:0.6em">{title}</div>{table.body}'
