"""Reads the numbers of a figure off what it drew, as CSV for a link beside its caption.

A row is a point, a bar or a cell. The columns of its values are named as the axes are; `low` and
`high` are the ends of an error bar, `from` and `to` those of a bar that does not start at zero.
Pictures and schemes, which are axes without ticks, have no numbers; with a photograph among its
axes a figure has no CSV at all. A label that starts with "_" names a series that the legend of a
figure leaves out.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.axes import Axes
from matplotlib.category import StrCategoryFormatter
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedFormatter, FuncFormatter

__all__ = ["csv_link", "csv_of"]

MOST = 100_000  # characters of a figure's CSV; a larger one would weigh on the page
FIRST, LAST = ("panel", "series"), ("low", "high", "from", "to")  # columns, where they are used
EMPTY = ("", None)
NEAR = 1e-9  # of places that are meant to be equal
UNNAMED = re.compile(r"_(child\d+|nolegend_|container\d+)?|")  # matplotlib's own names

Row = dict[str, Any]


def csv_link(fig: Figure, caption: str) -> str:
    """Makes the link to the numbers of a figure; "" where there are none, or too many."""
    content = csv_of(fig)
    if not content or len(content) > MOST:
        return ""
    name = "-".join(re.findall(r"\w+", caption.lower())[:6])
    data = quote(content, safe=",.:;()[]/*+=-_")
    return (
        f' <a class="take-away" download="{html.escape(name)}.csv" '
        f'href="data:text/csv;charset=utf-8,{html.escape(data)}">this figure as CSV</a>'
    )


def csv_of(fig: Figure) -> str:
    """Writes the numbers of a figure as CSV; "" where it shows none."""
    panels = [ax for ax in fig.axes if ax.get_visible() and not _is_colour_bar(ax)]
    if any(image.get_array().ndim == 3 for ax in panels for image in ax.images):
        return ""
    rows_of_panel = [(ax, list(_rows(ax))) for ax in panels if _has_ticks(ax)]
    rows_of_panel = [(ax, rows) for ax, rows in rows_of_panel if rows]
    rows = []
    for number, (ax, of_panel) in enumerate(rows_of_panel, 1):
        panel = {"panel": _title(ax) or str(number)} if len(rows_of_panel) > 1 else {}
        rows += [panel | row for row in of_panel]
    # in the order in which they appear
    used = dict.fromkeys(name for row in rows for name, value in row.items() if value not in EMPTY)
    between = [name for name in used if name not in (*FIRST, *LAST)]
    columns = [name for name in (*FIRST, *between, *LAST) if name in used]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([columns, *([_cell(row.get(name, "")) for name in columns] for row in rows)])
    return out.getvalue() if rows else ""


def _cell(value: Any) -> str:
    """Writes a value: whole numbers as such, others with six digits."""
    if value is None or isinstance(value, str):
        return value or ""
    value = float(value)
    if not np.isfinite(value):
        return ""
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"


# ---------------------------------------------------------------- axes and their names


def _is_colour_bar(ax: Axes) -> bool:
    return ax.get_label() == "<colorbar>"


def _has_ticks(ax: Axes) -> bool:
    return ax.axison and len(ax.get_xticks()) > 0 and len(ax.get_yticks()) > 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _title(ax: Axes) -> str:
    return _one_line(ax.get_title() or ax.get_title(loc="left"))


def _axis_names(ax: Axes) -> tuple[str, str]:
    """Returns the names of both axes, where need be those of a panel below, beside, or shared."""
    place = ax.get_subplotspec()
    panels = [one for one in ax.figure.axes if not _is_colour_bar(one)]
    others = [one for one in panels if one.get_subplotspec() and place]
    column = [one for one in others if one.get_subplotspec().colspan == place.colspan]
    row = [one for one in others if one.get_subplotspec().rowspan == place.rowspan]
    x_axes = (ax, *ax.get_shared_x_axes().get_siblings(ax), *column)
    y_axes = (ax, *ax.get_shared_y_axes().get_siblings(ax), *row)
    x = next((_one_line(one.get_xlabel()) for one in x_axes if one.get_xlabel()), "x")
    y = next((_one_line(one.get_ylabel()) for one in y_axes if one.get_ylabel()), "y")
    return (f"{x} (across)", f"{y} (down)") if x == y else (x, y)


def _names_of_ticks(axis: Any) -> dict[float, str]:
    """Returns {place: text} of an axis whose ticks have texts of their own."""
    formatter = axis.get_major_formatter()
    if not isinstance(formatter, FixedFormatter | FuncFormatter | StrCategoryFormatter):
        return {}
    places = axis.get_majorticklocs()
    texts = [_one_line(str(text)) for text in formatter.format_ticks(places)]
    return {float(place): text for place, text in zip(places, texts, strict=True) if text}


def _named(place: float, names: dict[float, str]) -> float | str:
    """Returns the text of the tick at a place; bars beside each other share the one they surround.

    Ticks of numbers name their own place only. Where they count from another number than their
    places do (the first expert is 1), places between them do so, too.
    """
    exact = next((text for tick, text in names.items() if abs(tick - place) < NEAR), None)
    if exact is not None:
        return exact
    are_words = any(not re.fullmatch(r"[-−+.\d%]+", text) for text in names.values())
    if are_words and list(names) == list(range(len(names))):
        return names.get(float(np.round(place)), place)
    if names and all(re.fullmatch(r"\d+", text) for text in names.values()):
        ahead = {int(text) - tick for tick, text in names.items()}
        return place + ahead.pop() if len(ahead) == 1 else place
    return place


def _series(artist: Any) -> str:
    """Returns the name of what was drawn; a leading "_" hides it from the legend only."""
    label = str(artist.get_label())
    return "" if UNNAMED.fullmatch(label) else _one_line(label.removeprefix("_"))


# ---------------------------------------------------------------- rows of what was drawn


def _rows(ax: Axes) -> Iterator[Row]:
    """Yields the rows of a panel, with places named as its ticks are."""
    x_name, y_name = _axis_names(ax)
    x_texts, y_texts = _names_of_ticks(ax.xaxis), _names_of_ticks(ax.yaxis)
    for series, x, y, further in _drawn(ax):
        row: Row = {"series": series} if series else {}
        row[x_name] = None if x is None else _named(x, x_texts)
        row[y_name] = None if y is None else _named(y, y_texts)
        yield row | further


Drawn = tuple[str, float | None, float | None, Row]


def _drawn(ax: Axes) -> Iterator[Drawn]:
    """Yields (series, x, y, further columns) of all that a panel drew, in the order of kinds."""
    part_of_container = {id(part) for container in ax.containers for part in _parts(container)}
    for container in ax.containers:
        if isinstance(container, BarContainer):
            yield from _of_bars(container)
        elif isinstance(container, ErrorbarContainer) and container.lines[0] is not None:
            if id(container) not in part_of_container:  # those of bars belong to the bars
                yield from _of_line(container.lines[0], _segments(container.lines[2]), container)
    free = [one for one in ax.collections if id(one) not in part_of_container]
    segments = _segments([one for one in free if isinstance(one, LineCollection)])
    for line in ax.lines:
        if id(line) not in part_of_container:
            yield from _of_line(line, segments, line)
    for points in free:
        if isinstance(points, PathCollection):
            yield from _of_points(points)
    for image in ax.images:
        yield from _of_image(image)


def _parts(container: Any) -> Iterator[Any]:
    """Yields the artists of a container, and the container that it holds."""
    if isinstance(container, BarContainer):
        if container.errorbar is not None:
            yield container.errorbar
            yield from _parts(container.errorbar)
        return
    line, caps, bars = container.lines
    yield from (part for part in (line, *caps, *bars) if part is not None)


def _segments(collections: Sequence[LineCollection]) -> list[np.ndarray]:
    """Returns the straight lines (2, 2) of some collections, such as error bars."""
    return [
        np.asarray(segment)
        for collection in collections
        for segment in collection.get_segments()
        if len(segment) == 2
    ]


def _ends(x: float, y: float, segments: Sequence[np.ndarray]) -> Row:
    """Returns the ends of the line, upright or else level, that passes through a point."""
    for across, along, turn in ((x, y, 1), (y, x, -1)):
        for segment in segments:
            places, (low, high) = segment.T[::turn][0], np.sort(segment.T[::turn][1])
            is_there = np.abs(places - across).max() < NEAR and low - NEAR <= along <= high + NEAR
            if is_there and high > low:
                return {"low": low, "high": high}
    return {}


def _of_line(line: Any, segments: Sequence[np.ndarray], named: Any) -> Iterator[Drawn]:
    """Yields the points of a line; one across the whole panel has one place.

    A line without a name or markers only joins points that are drawn as such.
    """
    series, ax = _series(named), line.axes
    if not series and line.get_marker() in ("", " ", "None", None):
        return
    if line.get_transform() != ax.transData:
        if series and line.get_transform() == ax.get_yaxis_transform(which="grid"):
            yield series, None, float(line.get_ydata()[0]), {}
        elif series and line.get_transform() == ax.get_xaxis_transform(which="grid"):
            yield series, float(line.get_xdata()[0]), None, {}
        return
    for x, y in np.asarray(line.get_xydata(), float):
        if np.isfinite(x) and np.isfinite(y):
            yield series, x, y, _ends(x, y, segments)


def _of_bars(container: BarContainer) -> Iterator[Drawn]:
    """Yields the middle and the length of each bar."""
    series = _series(container)
    level = container.orientation == "horizontal"
    errors = container.errorbar
    segments = _segments(errors.lines[2]) if errors is not None else []
    for bar in container.patches:
        x, y, width, height = bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()
        start, length, middle = (x, width, y + height / 2) if level else (y, height, x + width / 2)
        point = (length, middle) if level else (middle, length)
        tip = (start + length, middle) if level else (middle, start + length)
        span = {"from": start, "to": start + length} if start else {}
        if np.isfinite(length):
            yield series, *point, span | _ends(*tip, segments)


def _of_points(points: PathCollection) -> Iterator[Drawn]:
    """Yields scattered points, with the values that choose their colours."""
    values, name = points.get_array(), _colour_name(points)
    for i, (x, y) in enumerate(np.ma.filled(points.get_offsets(), np.nan)):
        if np.isfinite(x) and np.isfinite(y):
            yield _series(points), x, y, {} if values is None else {name: float(values[i])}


def _of_image(image: AxesImage) -> Iterator[Drawn]:
    """Yields the cells of a heat map, row by row."""
    table, name = np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan), _colour_name(image)
    for (row, column), value in np.ndenumerate(table):
        yield "", column, row, {name: value}


def _colour_name(drawn: Any) -> str:
    """Returns the label of the colour bar, which panels may share; "value" if there is none."""
    own = drawn.colorbar.ax if drawn.colorbar is not None else None
    bars = [own] if own is not None else list(filter(_is_colour_bar, drawn.axes.figure.axes))
    labels = {_one_line(bar.get_ylabel() or bar.get_xlabel()) for bar in bars}
    return labels.pop() or "value" if len(labels) == 1 else "value"
