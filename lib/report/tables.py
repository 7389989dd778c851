"""Makes tables that keep their sources apart: published, reproduced, this build.

They are HTML that scrolls sideways on a phone. A cell is a number, an Interval (printed with
interval and n), a text, None (no value) or `secondary(...)`. The cell of a missing record stays
empty but for a mark; the note below the table says where to read how it is computed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ..verdicts.stats import Interval, format_interval
from . import CAPTION_STYLE, NOT_YET, escaped

__all__ = ["COST_DECIMALS", "GROUPS", "Secondary", "Table", "secondary", "table", "three_groups"]

GROUPS = ("published", "reproduced", "this build")
SETTING = "setting"  # the group of the columns that say what a row is
MISSING = "–"  # the cell of a record that is not there
# Decimals of the columns that tables of sizes share: small models are small.
COST_DECIMALS = {
    "stored (M)": 3,
    "active (M)": 3,
    "parameters (M)": 3,
    "MACs (G)": 4,
}


@dataclass(frozen=True)
class Secondary:
    """Is a published value that was not read from its source but in a third party's account."""

    value: Any
    source: str


def secondary(value: Any, source: str) -> Secondary:
    """Marks a published value as retold: a dagger and a note say of what, and who retells it."""
    return Secondary(value, source)


@dataclass(frozen=True)
class Table:
    """Holds formatted cells, ready to be displayed. frame: texts only; notes: lines below it."""

    frame: pd.DataFrame
    caption: str
    notes: tuple[str, ...] = ()
    wrap: bool = False  # sentences in cells break over lines instead of scrolling
    deciding: tuple[int, ...] = ()  # rows that stand in sight; none = all

    def shortened(self, *rows: int) -> Table:
        """Returns the table with these rows in sight and all of them folded below."""
        return replace(self, deciding=tuple(row for row in rows if row < len(self.frame)))

    @property
    def html(self) -> str:
        """Writes a scrollable table with caption and notes; equal tables are equal text."""
        return in_figure(self.caption, self.body, self.notes)

    @property
    def body(self) -> str:
        """Writes the scrollable table alone; what this build computed is folded below it.

        This build shows that a page runs. Beside what was reproduced it would look like evidence.
        """
        shown, of_build = self._by_source()
        folds = {}
        if 0 < len(self.deciding) < len(shown):
            folds[f"all {len(_without_blank_rows(shown))} rows"] = shown
            shown = shown.iloc[list(self.deciding)]
        if of_build is not None:
            folds[GROUPS[2]] = of_build
        in_sight = self._body_of(shown) if len(shown) or not folds else ""
        return in_sight + "".join(
            folded(name, self._body_of(frame)) for name, frame in folds.items()
        )

    def _by_source(self) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        """Parts what this build computed, in columns or in rows, from the rest."""
        if self.frame.columns.nlevels == 2:
            group = self.frame.columns.get_level_values(0)
            of_build = group == GROUPS[2]
            both = of_build | (group == SETTING)
            return self.frame.loc[:, ~of_build], self.frame.loc[:, both] if of_build.any() else None
        if "source" in self.frame:
            of_build = (self.frame["source"] == GROUPS[2]).to_numpy()
            if of_build.any():
                return self.frame[~of_build], self.frame[of_build]
        return self.frame, None

    def _body_of(self, frame: pd.DataFrame) -> str:
        frame = _without_blank_rows(frame)
        styler = (
            frame.style.format(escape="html").format_index(escape="html", axis=1).hide(axis="index")
        )
        styler.set_uuid(self._uuid_of(frame))
        styler.set_table_attributes(
            'class="dataframe" style="border-collapse:collapse'
            f'{"" if self.wrap else ";white-space:nowrap"}"'
        )
        styler.map(_look)
        many = frame.shape[1] > 8  # as many as a page of text is wide at the larger size
        rules = [
            {"selector": "td, th", "props": f"padding:0.15em {0.35 if many else 0.5}em"},
            {"selector": "", "props": f"font-size:{0.78 if many else 0.9}em"},
            # long column names break, so that a table of numbers is as wide as its numbers
            {"selector": "thead th", "props": "white-space:normal;vertical-align:bottom"},
        ]
        if frame.columns.nlevels == 2:
            # A rule between the groups: the eye must not run from one source into the next.
            starts = [
                i
                for i in range(1, frame.shape[1])
                if frame.columns[i][0] != frame.columns[i - 1][0]
            ]
            rules += [
                {"selector": f".col{i}", "props": "border-left:2px solid #888"} for i in starts
            ]
        styler.set_table_styles(rules)
        # pandas leaves out the scope, by which screen readers tie a cell to its column
        body = styler.to_html().replace("<th ", '<th scope="col" ')
        body = _INTERVAL.sub(r'<span class="interval">\g<0></span>', body)
        return f'<div style="overflow-x:auto;max-width:100%" tabindex="0">{body}</div>'

    def _uuid_of(self, frame: pd.DataFrame) -> str:
        # From the content: tables on one page must not share their style rules, and equal tables
        # must be equal text.
        names = "".join(map(str, [*frame.columns, *frame.index]))
        return hashlib.sha256(f"{self!r}{names}".encode()).hexdigest()[:10]

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return "\n".join([self.caption, self.frame.to_string(index=False), *self.notes])


def folded(name: str, body: str) -> str:
    """Folds HTML below its name, which is HTML, too."""
    return f"<details><summary>{name}</summary>{body}</details>"


def in_figure(caption: str, body: str, notes: Sequence[str]) -> str:
    """Puts HTML between a caption and notes, which are plain text."""
    below = "".join(f"<div>{escaped(note)}</div>" for note in notes)
    return (
        f'<figure style="margin:1em 0"><figcaption style="{CAPTION_STYLE}">'
        f"{escaped(caption)}</figcaption>{body}"
        f'<div style="font-size:0.85em;line-height:1.5">{below}</div></figure>'
    )


def _without_blank_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Leaves out settings without a value or mark in any group, such as those of a build."""
    if frame.columns.nlevels < 2:
        return frame
    values = frame.loc[:, frame.columns.get_level_values(0) != SETTING]
    filled = (values != "").any(axis=1)
    return frame[filled] if filled.any() else frame


# "+6.3 [+4.0, +8.7]," in a cell: it stays on one line where the cell is broken (book.css)
_INTERVAL = re.compile(r"[+-]?\d[\d.]* \[[^\]<]*\],?(?=[^<>]*</td>)")
# a number with unit, interval and n, or counted; not "8 experts, 50% active", "+ mean shift" or
# "3 → 0"
_NUMERIC = re.compile(r"(?!.*(?:[a-z][,;] (?!n=|counted)|→))(?:[+-]?\d|–)", re.DOTALL)


def _look(cell: str) -> str:
    """Styles a cell: numbers right and unbroken, long texts wrapped, missing and retold ones paler.

    A cell of several lines keeps them.
    """
    numeric = len(cell) <= 40 and _NUMERIC.match(cell)
    paler = "color:var(--pst-color-text-muted, #6a6a6a);"  # the theme's, in light and dark
    return (
        ("text-align:right;white-space:nowrap;" if numeric else "text-align:left;")
        + ("white-space:normal;min-width:18em;" if len(cell) > 40 else "")
        + ("white-space:pre;" if "\n" in cell else "")
        + (paler if cell.startswith(MISSING) or cell.endswith("†") else "")
    )


def _absent(value: Any) -> bool:
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    return value is None or value is pd.NA or value is pd.NaT


def _number(value: Any, decimals: int) -> str:
    """Writes one value; floats get `decimals`, booleans yes and no, texts and integers stay."""
    if _absent(value):
        return ""
    if isinstance(value, Interval):
        return format_interval(value, decimals)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return f"{value:.{decimals}f}" if isinstance(value, float | np.floating) else str(value)


def _setting(value: Any) -> str:
    """Writes a setting; 8.0 is printed as 8, since pandas makes floats of integers with a gap."""
    if isinstance(value, float | np.floating) and not _absent(value):
        return f"{value:g}"
    return _number(value, 1)


class Notes:
    """Collects what notes must say of cells, sources in the order in which cells need them."""

    def __init__(self) -> None:
        self.lacks_records = False
        self.sources: list[str] = []
        self.interval_methods: list[str] = []

    def missing(self) -> str:
        """Marks the cell of a missing record."""
        self.lacks_records = True
        return MISSING

    def retold(self, source: str) -> str:
        """Marks a retold value with the daggers of its source."""
        if source not in self.sources:
            self.sources.append(source)
        return "†" * (self.sources.index(source) + 1)

    def interval(self, value: Any) -> None:
        """Notes how an interval was made, where one is printed."""
        if isinstance(value, Interval) and value.low is not None:
            if value.method not in self.interval_methods:
                self.interval_methods.append(value.method)

    def lines(self) -> list[str]:
        """Writes the notes below a table."""
        methods = ", ".join(self.interval_methods)
        intervals = f"Intervals: {methods} over n seeds; none where n is below 3."
        return [
            *([intervals] if methods else []),
            *([f"{MISSING} {NOT_YET}"] if self.lacks_records else []),
            *(f"{self.retold(s)} secondary: {s}" for s in self.sources),
        ]


def table(
    frame: pd.DataFrame,
    caption: str,
    decimals: int | Mapping[str, int] = 1,
    notes: Sequence[str] = (),
    wrap: bool = False,
) -> Table:
    """Makes a plain table of numbers, intervals and texts; units belong into the column names.

    decimals: for all columns, or {column: decimals} (1 where a column is not named). wrap: breaks
    long cells over lines. Raises ValueError without a caption.
    """
    if not caption.strip():
        raise ValueError("a table needs a caption: what is shown, on which data, with which n")
    below = Notes()
    decimals_of = decimals if isinstance(decimals, Mapping) else dict.fromkeys(frame, decimals)
    cells = {
        column: [_cell(value, decimals_of.get(column, 1), below) for value in frame[column]]
        for column in frame
    }
    texts = pd.DataFrame(cells, dtype=object)
    texts.columns = frame.columns
    empty = () if len(texts) else ("No record yet.",)
    return Table(texts, caption, (*notes, *empty, *below.lines()), wrap)


def _cell(value: Any, decimals: int, notes: Notes) -> str:
    """Writes a cell that is no missing record, and notes the source of a retold value."""
    if isinstance(value, Secondary):
        return _number(value.value, decimals) + notes.retold(value.source)
    return _number(value, decimals)


Columns = Mapping[str, Sequence[Any]]


def three_groups(
    index_frame: pd.DataFrame,
    published: Columns,
    reproduced: Columns,
    build: Columns,
    is_planned: Callable[[int, str], bool],
    *,
    caption: str = "",
    decimals: int = 1,
    notes: Sequence[str] = (),
    reproduced_on: str = "",
) -> Table:
    """Puts published, reproduced and this build beside each other, never mixed.

        three_groups(
            pd.DataFrame({"E": [8], "L": [2]}),
            {"top-1 (%)": [91.3]},
            {"top-1 (%)": [accuracy_interval(records)]},
            {"top-1 (%)": [None]},
            lambda row, group: True,
            caption="CIFAR-100 top-1.",
        )

    index_frame: the settings, one row each (E, L, shared, ...). published, reproduced, build:
    {column: one cell a row}; an empty mapping leaves the group out of sight for published and gives
    one empty column for the others. is_planned: says of row number and group whether an empty cell
    of the last two groups waits for a record, and is marked; the others stay blank. reproduced_on:
    the data of that group, where they stand in for the published ones; its header names them. The
    interval is named in a note wherever one is printed. Raises ValueError for a column of another
    length.
    """
    rows, below = len(index_frame), Notes()
    cells: dict[tuple[str, str], list[str]] = {}
    for name in index_frame:
        cells[SETTING, str(name)] = [_setting(value) for value in index_frame[name]]
    for group, columns in zip(GROUPS, (published, reproduced, build), strict=True):
        if not columns and group != "published":
            columns = {next(iter(published), "value"): [None] * rows}
        for name, values in columns.items():
            if len(values) != rows:
                raise ValueError(
                    f"column {name!r} of group {group!r} has {len(values)} cells for {rows} rows: "
                    "give one cell a row, None where there is no value"
                )
            cells[group, name] = [
                _cell_of_group(value, decimals, below, group, is_planned(row, group))
                for row, value in enumerate(values)
            ]
    headers = {GROUPS[1]: f"{GROUPS[1]} on {reproduced_on}"} if reproduced_on else {}
    frame = pd.DataFrame(cells, dtype=object)
    frame.columns = pd.MultiIndex.from_tuples(
        [(headers.get(group, group), name) for group, name in cells]
    )
    caption = caption or "Published, reproduced and this build."
    return Table(frame, caption, (*notes, *below.lines()))


def _cell_of_group(value: Any, decimals: int, notes: Notes, group: str, is_planned: bool) -> str:
    """Writes a cell of `three_groups`; an absent value of a run gets a mark."""
    notes.interval(value)
    if not _absent(value) or group == "published":
        return _cell(value, decimals, notes)
    return notes.missing() if is_planned else ""
