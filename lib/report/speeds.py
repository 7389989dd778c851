"""Draws and tabulates measured speeds: shares of a bound, with goals marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import pandas as pd
from matplotlib.figure import Figure

from ..verdicts import count, listed
from ..verdicts.speed import (
    FASTEST_PEER,
    MEDIAN_PEER,
    MEDIAN_PEER_EXPERTS,
    MEDIAN_PEER_GOAL,
    PARTS,
    Measurement,
    Ratio,
)
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
            chosen = [row for row in drawn if (row.dtype, row.is_frozen) == (dtype, frozen)]
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
    return table(pd.DataFrame([_cells(row) for row in rows]), caption, decimals=2)


def shortfalls(machines: Sequence[Measurement], caption: str) -> Table:
    """Tabulates the rows below their goal on each machine, farthest first, with the cause."""
    missed = [(measured, row) for measured in machines for row in measured.short]
    missed.sort(key=lambda pair: pair[1].ratio / pair[1].goal)
    rows = [
        {
            "processor": measured.machine_name,
            "what": what(row),
            "shape": row.shape,
            "dtype": row.dtype,
            "ours": row.ours_is,
            "against": _named(row),
            **_ratio_and_goal(row),
            "cause": measured.cause(row),
        }
        for measured, row in missed
    ]
    columns = ["processor", "what", "shape", "dtype", "ours", "against", "ratio", "goal", "cause"]
    return table(pd.DataFrame(rows, columns=columns), caption, wrap=True)


def goals_reached(machines: Sequence[Measurement]) -> str:
    """Says how many of its goals each machine reaches, and how many it could not measure."""
    goals, said = _rows_by_goal(machines), []
    for measured in machines:
        rows = [found.get(measured.machine_name) for found in goals.values()]
        there = [row for row in rows if row and row.reached is not None]
        counted = f"{sum(bool(row.reached) for row in there)} of {len(there)}"
        absent = len(rows) - len(there)
        more = f", {absent} more not measured" if absent else ""
        said.append(f"{counted} on {measured.machine_name}{more}")
    return f"Goals of the benchmark reached: {'; '.join(said)}."


def not_measured(machines: Sequence[Measurement]) -> str:
    """Says in a sentence for a caption why machines could not measure goals, and how many; "" where
    each measured all."""
    goals, said = _rows_by_goal(machines), []
    for measured in machines:
        rows = {sides: found.get(measured.machine_name) for sides, found in goals.items()}
        absent = [sides for sides, row in rows.items() if not row or row.reached is None]
        reasons = Counter(_why_absent(measured, rows[sides], sides) for sides in absent)
        whys = "; ".join(f"{why}: {count(number, 'row')}" for why, number in reasons.items())
        said += [f"on {measured.machine_name}, {whys}"] if whys else []
    return f" Not measured: {'. Not measured: '.join(said)}." if said else ""


def _rows_by_goal(machines: Sequence[Measurement]) -> dict[tuple[str, ...], dict[str, Ratio]]:
    """Finds the rows of every goal that some machine has, by the machine's name."""
    found: dict[tuple[str, ...], dict[str, Ratio]] = {}
    for measured in machines:
        for row in map(_with_goal_of_median, measured.rows):
            sides = (what(row), row.shape, row.dtype, row.ours_is, _against(row))
            found.setdefault(sides, {})[measured.machine_name] = row
    return {sides: rows for sides, rows in found.items() if any(r.goal for r in rows.values())}


def _with_goal_of_median(row: Ratio) -> Ratio:
    """Takes the times from a row that has one other layer for a median, and gives it the goal that
    two would have: it is not measured, and not left out."""
    has_goal = any(f" E={experts} " in row.shape for experts in MEDIAN_PEER_EXPERTS)
    if row.against != MEDIAN_PEER or row.goal is not None or not has_goal:
        return row
    why = "a median wants two other layers that compute the same"
    return replace(row, goal=MEDIAN_PEER_GOAL, ours=None, other=None, note=why)


def _why_absent(measured: Measurement, row: Ratio | None, sides: tuple[str, ...]) -> str:
    """Says why a goal was not measured: by its own row, else by the one of the layer that says what
    the machine cannot do in that dtype."""
    _, _, dtype, _, against = sides
    rows = [row] if row else [r for r in measured.rows if r.part == "layer" and r.dtype == dtype]
    notes = (r.note for r in rows if r.ratio is None and r.note)
    return next(notes, f"no {against} to compare with")


def in_one_layer(machines: Sequence[Measurement]) -> str:
    """Says which share of the speed of its dense bound a layer reaches, plain against plain."""
    layers = [row for measured in machines for row in measured.of("layer")]
    ratios = sorted(row.ratio for row in layers if not row.is_frozen)
    return (
        f"One MoE layer reaches {ratios[0]:.2f} to {ratios[-1]:.2f} of the speed of dense MLPs "
        f"that multiply as much (median {median(ratios):.2f})."
    )


def beside_others(machines: Sequence[Measurement]) -> str:
    """Says in how many settings ours is at least as fast as each other layer that was timed beside
    it and computes the same, plain against plain."""
    alike = [measured.plain(row) for measured in machines for row in _fastest_peers(measured)]
    counted = _not_slower([row for row in alike if row])
    return (
        "It is at least as fast as each other layer that was timed beside it and computes the same "
        f"in {counted} settings."
    )


def peer_table(machines: Sequence[Measurement], caption: str) -> Table:
    """Tabulates ours beside the fastest other layer that computes the same, plain against plain and
    frozen against plain; the caption names those that were timed."""
    rows = []
    for measured in machines:
        caption += f" On {measured.machine_name} beside: {', '.join(_others(measured))}."
        for row in _fastest_peers(measured):
            plain = measured.plain(row)
            rows.append(
                {
                    "processor": measured.machine_name,
                    "what": what(row),
                    "shape": row.shape,
                    "dtype": row.dtype,
                    "fastest other": _fastest(row),
                    "plain, against plain": plain and plain.ratio,
                    "frozen, against plain": row.ratio if row.is_frozen else None,
                }
            )
    return table(pd.DataFrame(rows), caption, decimals=3)


def _others(measured: Measurement) -> list[str]:
    """Names the other layers that were timed and compute the same; a note says what some drop."""
    return list(dict.fromkeys(row.against for row in measured.of("peers") if not row.note))


def _fastest_peers(measured: Measurement) -> list[Ratio]:
    return [row for row in measured.of("peers") if row.against == FASTEST_PEER]


def _not_slower(rows: Sequence[Ratio]) -> str:
    return f"{sum(row.ratio >= 1 for row in rows)} of {len(rows)}"


def _fastest(row: Ratio) -> str:
    """Names the layer that a row of the fastest peer stands for, which its note begins with."""
    return row.note.rpartition(", of the ")[0]


def _named(row: Ratio) -> str:
    return f"{row.against}: {_fastest(row)}" if row.against == FASTEST_PEER else row.against


def _cut_rows(measured: Measurement) -> list[Ratio]:
    """Lists the rows of the kinds of CUT beside the whole model."""
    rows = measured.of("models")
    return [row for row in rows if row.against == "whole model" and row.ours_is in CUT]


def fastest_cut(machines: Sequence[Measurement], kind: str) -> float:
    """Finds how many times as fast as the whole model a kind of CUT is at best, on any machine."""
    rows = [row for measured in machines for row in _cut_rows(measured) if row.ours_is == kind]
    return max(row.other.median / row.ours.median for row in rows)


def in_whole_models(machines: Sequence[Measurement]) -> str:
    """Says at which batches an extracted mixture is faster than the whole model, how many times as
    fast it is at best, and how many times fewer multiply-adds it has."""
    rows = [row for measured in machines for row in _cut_rows(measured)]
    rows = [row for row in rows if row.ours_is == "extracted"]
    best = _best_of_batches(rows)
    faster = [batch for batch, factor in best.items() if round(factor, 2) > 1]  # as printed
    slower = [batch for batch in best if batch not in faster]
    lead = f"Faster at {listed(faster)}" if faster else "No"
    if faster and slower:
        lead += f", not at {' or '.join(slower)}"
    return (
        f"**{lead}:** of whole models, {CUT['extracted']} multiplies "
        f"{max(row.ideal for row in rows):.2f} times less than the dense one; times as fast at "
        f"best: {_by_batch(rows)}."
    )


def cut_limit(machines: Sequence[Measurement]) -> str:
    """Says how many times fewer multiply-adds a cut model has, and that the clock may differ."""
    limit = max(row.ideal for measured in machines for row in _cut_rows(measured))
    return (
        f"With half of the MLPs' neurons a ViT-S at 224 px has {limit:.2f} times fewer "
        "multiply-adds; that is a count, and no upper bound on the clock."
    )


def cut_times(machines: Sequence[Measurement]) -> str:
    """Says how many times as fast as the whole model each kind of CUT is at best, a sentence a
    dtype, narrow ones first; then on which machines that was measured."""
    rows = [row for measured in machines for row in _cut_rows(measured)]
    dtypes = sorted({row.dtype for row in rows})  # bf16 before fp32
    sentences = [_best_times([row for row in rows if row.dtype == dtype]) for dtype in dtypes]
    return " ".join([*sentences, f"Timed on {'; on '.join(map(_machine, machines))}."])


def _best_times(rows: Sequence[Ratio]) -> str:
    """Says of rows of one dtype how fast each kind is at best, plain or frozen, by batch."""
    of_kind = {name: [row for row in rows if row.ours_is == kind] for kind, name in CUT.items()}
    kinds = [f"{name} {_by_batch(of_name)}" for name, of_name in of_kind.items() if of_name]
    return f"In {rows[0].dtype}, times as fast as the whole model at best: {'; '.join(kinds)}."


def _by_batch(rows: Sequence[Ratio]) -> str:
    """Writes how many times as fast as the other side ours is at best: "1.18 at batch 16 and 0.88
    at batch 1"."""
    best = _best_of_batches(rows)
    return listed([f"{factor:.2f} at {batch}" for batch, factor in best.items()])


def _best_of_batches(rows: Sequence[Ratio]) -> dict[str, float]:
    """Finds how many times as fast as the other side ours is at best, by "batch 16", "batch 1"; the
    largest batch comes first, where a cut pays most."""
    best: dict[str, float] = {}
    for row in rows:
        batch = row.shape.partition(",")[0]
        best[batch] = max(best.get(batch, 0.0), row.other.median / row.ours.median)
    return dict(sorted(best.items(), key=lambda item: -int(item[0].split()[-1])))


def timed_on(machines: Sequence[Measurement]) -> str:
    """Says on which machines was timed, and beside how many other layers."""
    said = [f"{_machine(m)}, beside {count(len(_others(m)), 'other layer')}" for m in machines]
    return f"Timed on {'; on '.join(said)}."


def _machine(measured: Measurement) -> str:
    """Names a machine with its threads, and says where other work made its times uncertain."""
    caution = " (uncertain: other work ran beside it)" if measured.disturbed else ""
    threads = count(measured.about["machine"]["threads"], "thread")
    return f"{measured.machine_name}, {threads}{caution}"


def by_machine(machines: Sequence[Measurement], caption: str) -> Table:
    """Tabulates the goals that some machine was measured against: the ratio that each reached, and
    "not measured" where it cannot measure the row or had nothing to compare with."""
    names = [measured.machine_name for measured in machines]
    cells = []
    for sides, rows in _rows_by_goal(machines).items():
        with_goal = {name: row for name, row in rows.items() if row.reached is not None}
        written = {name: _ratio_and_goal(row) for name, row in with_goal.items()}
        goal = max((w["goal"] for w in written.values()), key=len, default="")
        ratios = {n: written[n]["ratio"] if n in written else "not measured" for n in names}
        cells.append([*sides, goal, *ratios.values()])
    columns = ["what", "shape", "dtype", "ours", "against", "goal", *names]
    return table(pd.DataFrame(cells, columns=columns), caption)


def _ratio_and_goal(row: Ratio) -> dict[str, str]:
    """Writes the ratio and goal of a measured row with two decimals, and with three where two would
    hide a miss."""
    decimals = 3 if row.reached is False and round(row.ratio, 2) >= round(row.goal, 2) else 2
    goal = "" if row.goal is None else f"{row.goal:.{decimals}f}"
    return {"ratio": f"{row.ratio:.{decimals}f}", "goal": goal}


def _cells(row: Ratio) -> dict[str, object]:
    """Makes the cells of one row; times are absent where nothing was measured."""
    times = {"ours (ms)": row.ours, "against (ms)": row.other}
    written = _ratio_and_goal(row) if row.ratio is not None else {"ratio": "", "goal": ""}
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
        "ratio": written["ratio"],
        "ratio of 10% quantiles": row.low_ratio,
        "goal": written["goal"],
        "reached": row.reached,
        "note": row.note,
    }
