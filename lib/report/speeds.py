"""Draws and tabulates measured speeds: shares of a bound, with goals marked."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from ..verdicts.speed import PARTS, Ratio
from .style import COLOURS, MARKERS, figure, legend_above, style
from .tables import Table, table

# filled where weights are plain, hollow where they are packed
_SERIES = {
    ("fp32", False): ("fp32", COLOURS[0], MARKERS[0]),
    ("fp32", True): ("fp32, frozen", COLOURS[0], MARKERS[1]),
    ("bf16", False): ("bf16", COLOURS[2], MARKERS[2]),
    ("bf16", True): ("bf16, frozen", COLOURS[2], MARKERS[3]),
}


def is_frozen(row: Ratio) -> bool:
    """Says whether ours ran with packed weights."""
    return "frozen" in row.ours_is or row.shape.endswith("frozen")


def what(row: Ratio) -> str:
    """Names what runs, with room to break the line: "forward + backward"."""
    return row.what.replace("+", " + ")


def label(row: Ratio) -> str:
    """Names what runs, at which shape and against what, whatever the dtype and the treatment."""
    shape = row.shape.removesuffix(", frozen").removesuffix(", plain")
    against = row.against
    if row.part == "layer":  # whichever form of the bound was the faster one
        against = "packed dense MLPs" if against.endswith("packed") else "plain dense MLPs"
    return f"{what(row)}, {shape}\nagainst {against}"


def shares(rows: Sequence[Ratio]) -> Figure:
    """Draws the ratio of each row to its bound, rows of one label beside each other.

    A bar leads from the median to the 10% quantile; goals are black ticks. Raises ValueError
    without a measured row.
    """
    drawn = [row for row in rows if row.ratio is not None and (row.dtype, False) in _SERIES]
    if not drawn:
        raise ValueError("no row was measured: give rows with times, in fp32 or bf16")
    drawn.sort(key=lambda row: list(PARTS).index(row.part))
    labels = list(dict.fromkeys(map(label, drawn)))
    goals = []
    with style():
        fig, axes = figure(height=1.0 + 0.42 * len(labels))
        ax = axes[0, 0]
        ax.axvline(1, color="#555555", linewidth=1)
        for place, ((dtype, frozen), (name, colour, marker)) in enumerate(_SERIES.items()):
            chosen = [row for row in drawn if (row.dtype, is_frozen(row)) == (dtype, frozen)]
            if not chosen:
                continue
            ys = [labels.index(label(row)) + 0.18 * (place - 1.5) for row in chosen]
            ratios = [row.ratio for row in chosen]
            ax.hlines(ys, ratios, [row.low_ratio for row in chosen], color=colour, linewidth=1)
            filled = "white" if frozen else colour
            look = {"color": colour, "marker": marker, "markerfacecolor": filled, "linestyle": ""}
            ax.plot(ratios, ys, label=name, **look)
            goals += [(row.goal, y) for row, y in zip(chosen, ys, strict=True) if row.goal]
        if goals:
            ax.plot(*zip(*goals, strict=True), color="black", label="goal", **_TICK)
        ax.set(
            xlabel="share of the bound (1: as fast as the bound allows)",
            yticks=range(len(labels)),
            yticklabels=labels,
            ylim=(len(labels) - 0.5, -0.5),
        )
        ax.set_xlim(left=0)
        ax.tick_params(axis="y", labelsize=7)
        legend_above(fig, [ax], columns=5)
    return fig


_TICK = {"marker": "|", "markersize": 9, "markeredgewidth": 2, "linestyle": ""}


def speed_table(rows: Sequence[Ratio], caption: str) -> Table:
    """Tabulates rows: times, ratio to the bound, both with their 10% quantile, goal, reached."""
    return table(pd.DataFrame([_cells(row) for row in rows]), caption, decimals=_DECIMALS)


_DECIMALS = {"ours (ms)": 1, "against (ms)": 1, "ratio": 2, "ratio of 10% quantiles": 2, "goal": 2}


def _cells(row: Ratio) -> dict[str, object]:
    """Makes the cells of one row; times are absent where nothing was measured."""
    times = {"ours (ms)": row.ours, "against (ms)": row.other}
    return {
        "what": what(row),
        "shape": row.shape,
        "dtype": row.dtype,
        "ours": row.ours_is,
        "against": row.against,
        **{
            name: timing and f"{timing.median:.1f} ({timing.low:.1f})"
            for name, timing in times.items()
        },
        "ratio": row.ratio,
        "ratio of 10% quantiles": row.low_ratio,
        "goal": row.goal,
        "reached": row.reached,
        "note": row.note,
    }
