"""Draws and tabulates measured speeds: shares of a bound, with goals marked."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from ..verdicts import count
from ..verdicts.speed import FASTEST_PEER, PARTS, Measurement, Ratio
from .style import COLOURS, MARKERS, figure, legend_above, style
from .tables import Table, table

# filled where weights are plain, hollow where they are packed
_SERIES = {
    ("fp32", False): ("fp32", COLOURS[0], MARKERS[0]),
    ("fp32", True): ("fp32, frozen", COLOURS[0], MARKERS[1]),
    ("bf16", False): ("bf16", COLOURS[2], MARKERS[2]),
    ("bf16", True): ("bf16, frozen", COLOURS[2], MARKERS[3]),
}

# models of fewer active neurons in the benchmark, in words
CUT = {"extracted": "the extracted mixture", "static model": "a static pruner"}


def is_frozen(row: Ratio) -> bool:
    """Says whether ours ran with packed weights."""
    return "frozen" in row.ours_is or row.shape.endswith("frozen")


def what(row: Ratio) -> str:
    """Names what runs, with room to break the line: "forward + backward"."""
    return row.what.replace("+", " + ")


def label(row: Ratio) -> str:
    """Names what runs, at which shape and against what, whatever the dtype and the treatment."""
    shape = row.shape.removesuffix(", frozen").removesuffix(", plain")
    return f"{what(row)}, {shape}\nagainst {_against(row)}"


def _against(row: Ratio) -> str:
    """Names the other side; of a layer's bound not its form, of which the faster one is taken."""
    if row.part != "layer":
        return row.against
    return "packed dense MLPs" if row.against.endswith("packed") else "plain dense MLPs"


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


def beside_others(measured: Measurement) -> str:
    """Says in how many settings ours is at least as fast as each other layer that was timed beside
    it and computes the same."""
    rows = measured.of("peers")
    fastest = [row for row in rows if row.against == FASTEST_PEER]
    others = dict.fromkeys(row.against for row in rows if not row.note)  # a note: it drops tokens
    settings = f"{sum(row.ratio >= 1 for row in fastest)} of {len(fastest)} settings"
    return f"in {settings} beside {' / '.join(others)} ({measured.machine_name})"


def _cut_rows(measured: Measurement) -> list[Ratio]:
    """Lists the rows of the kinds of CUT beside the whole model."""
    rows = measured.of("models")
    return [row for row in rows if row.against == "whole model" and row.ours_is in CUT]


def fastest_cut(machines: Sequence[Measurement], kind: str) -> float:
    """Finds how many times as fast as the whole model a kind of CUT is at best, on any machine."""
    rows = [row for measured in machines for row in _cut_rows(measured) if row.ours_is == kind]
    return max(row.other.median / row.ours.median for row in rows)


def cut_limit(machines: Sequence[Measurement]) -> str:
    """Says how many times as fast as the whole model a cut one could be."""
    limit = max(row.ideal for measured in machines for row in _cut_rows(measured))
    return (
        f"With half of the MLPs' neurons a ViT-S at 224 px could run {limit:.2f} times as fast, by "
        "its multiply-adds."
    )


def cut_times(machines: Sequence[Measurement]) -> str:
    """Says how many times as fast as the whole model each kind of CUT is, at best and at worst, on
    each machine."""
    return f"Measured at best, on {'; on '.join(map(_best_times, machines))}."


def _best_times(measured: Measurement) -> str:
    kinds = []
    for kind, name in CUT.items():
        times: dict[str, list[tuple[float, str]]] = {}
        for row in (row for row in _cut_rows(measured) if row.ours_is == kind):
            where = f"{row.dtype} ({row.shape.removesuffix(', plain')})"
            ratio = row.other.median / row.ours.median
            times.setdefault(row.dtype, []).append((ratio, where))
        best = (
            f"{ratio:.2f} times the speed in {where}" for ratio, where in map(max, times.values())
        )
        least, where = min(map(min, times.values()))
        slower = f", but {least:.2f} times in {where}" if least < 1 else ""
        kinds.append(f"{name} reaches {' and '.join(best)}{slower}")
    caution = " (uncertain: other work ran beside it)" if measured.disturbed else ""
    threads = count(measured.about["machine"]["threads"], "thread")
    return f"{measured.machine_name}, {threads}{caution}: {', '.join(kinds)}"


def by_machine(measurements: Sequence[Measurement], caption: str) -> Table:
    """Tabulates the rows with a goal: the ratio that each machine reached, absent where it cannot
    measure the row."""
    ratios: dict[tuple[object, ...], dict[str, float | None]] = {}
    for measurement in measurements:
        for row in measurement.rows:
            if row.goal is not None:
                key = (what(row), row.shape, row.dtype, row.ours_is, _against(row), row.goal)
                ratios.setdefault(key, {})[measurement.machine_name] = row.ratio
    names = [measurement.machine_name for measurement in measurements]
    columns = ["what", "shape", "dtype", "ours", "against", "goal"]
    cells = [
        dict(zip(columns, key, strict=True)) | {name: found.get(name) for name in names}
        for key, found in ratios.items()
    ]
    decimals = dict.fromkeys(["goal", *names], 2)
    return table(pd.DataFrame(cells, columns=[*columns, *names]), caption, decimals=decimals)


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
