"""Draws curves and points from records, or from values with intervals.

Published values and ours are never drawn into one panel: data, resolution and training differ, so
only shapes compare. Every function takes absent records (None) and says in the panel what is
missing.

Axis letters: **L** MoE layers of a model, **M** MoE layers from the shallowest to the deepest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..verdicts.routing import information
from ..verdicts.stats import Interval, finished, mean_interval
from .errorbars import Value, errorbar
from .style import COLOURS, LINES, MARKERS, figure, legend_above, note, number, style

__all__ = [
    "Curve",
    "depth_information",
    "information_by_depth",
    "scan",
    "training_curves",
]

# ---------------------------------------------------------------- scan


@dataclass(frozen=True)
class Curve:
    """Is one line of a scan.

    hue: chooses colour and marker (such as E); variant: the line style (such as shared or not).
    """

    x: Sequence[float]
    y: Sequence[Value]  # accuracy in percent; None = no record
    hue: Hashable
    variant: Hashable = ""

    @property
    def label(self) -> str:
        """Names the line in the legend."""
        return f"{self.hue}, {self.variant}" if self.variant else str(self.hue)


def scan(
    panels: dict[str, Sequence[Curve]],
    baselines: dict[str, Value] | None = None,
    *,
    xlabel: str = "number of MoE layers L",
    ylabel: str = "top-1 accuracy (%)",
    baseline_label: str = "no MoE layer",
    missing: str = "no record yet",
) -> Figure:
    """Draws accuracy against L, one panel a source, each with its own scale.

    Sources are published, reproduced, this build. A label has one look in all panels; markers are
    filled, hollow and grey for the first, second and later variants. baselines: {panel: value},
    drawn as a horizontal line. missing: text for a panel without a value, best the command that
    fills it.
    """
    hues = list(dict.fromkeys(c.hue for curves in panels.values() for c in curves))
    variants = list(dict.fromkeys(c.variant for curves in panels.values() for c in curves))
    with style():
        columns = len(panels) if len(panels) <= 3 else 2  # four in a row leave no room for labels
        rows = -(-len(panels) // columns)
        fig, axes = figure(rows, columns, height=3.5 if rows == 1 else 2.8 * rows)
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        for ax, (title, curves) in zip(axes.flat, panels.items(), strict=False):
            ax.set(title=fill(title, 80 // columns), xlabel=xlabel, ylabel=ylabel)
            drawn = False
            for c in curves:
                lap, i = divmod(hues.index(c.hue), len(COLOURS))
                j = variants.index(c.variant) + lap  # a colour that comes again comes dashed
                drawn |= errorbar(
                    ax,
                    c.x,
                    c.y,
                    color=COLOURS[i],
                    marker=MARKERS[i],
                    linestyle=LINES[j % len(LINES)],
                    markerfacecolor=(COLOURS[i], "white", "#c8c8c8")[min(j, 2)],
                    label=c.label,
                )
            base = (baselines or {}).get(title)
            if base is not None:
                drawn = True
                level = base.mean if isinstance(base, Interval) else base
                ax.axhline(level, color="#555555", linewidth=1, label=baseline_label)
            if drawn:
                ticks = sorted({x for c in curves for x in c.x})
                # others would run into each other
                if all(float(x).is_integer() for x in ticks) and len(ticks) <= 16:
                    ax.set_xticks(ticks)
            else:
                note(ax, missing)
        legend_above(
            fig, axes.flat[: len(panels)], columns=4 if len(hues) * len(variants) > 3 else 3
        )
    return fig


# ---------------------------------------------------------------- training


_HISTORY = {
    "val_top1": "validation top-1 (%)",
    "val_loss": "validation loss",
    "train_loss": "training loss",
    "train_task_loss": "training loss of the task",
    "train_balance_loss": "balance loss (1 = even)",
    "train_batch_variation": "batch-wise variation (tokens)",
    "lr": "learning rate",
}


def training_curves(
    records_of_label: dict[str, Sequence[Any]],
    values: Sequence[str] = ("val_top1", "train_loss"),
    missing: str = "no record yet",
) -> Figure:
    """Draws the history over epochs, one panel a value: the mean over seeds, and each seed thin.

    records_of_label: one record per seed for each line. values: keys of the history; the mean stops
    where the first seed stops. Raises ValueError for a key that is none.
    """
    unknown = [v for v in values if v not in _HISTORY]
    if unknown:
        raise ValueError(
            f"values={unknown} are not in the history: use some of {', '.join(_HISTORY)}"
        )
    with style():
        fig, axes = figure(1, len(values), height=3.4)
        for ax, key in zip(axes[0], values, strict=True):
            ax.set(xlabel="epoch", ylabel=_HISTORY[key])
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
            for i, (label, records) in enumerate(records_of_label.items()):
                curves = [
                    [(row["epoch"], row[key]) for row in r.history if row.get(key) is not None]
                    for r in finished(records)
                ]
                curves = [np.array(curve) for curve in curves if curve]
                if curves:
                    every = max(1, min(map(len, curves)) // 10)  # ten markers or so on a line
                    _draw_seeds_and_mean(ax, curves, i, label, markevery=every)
            if not ax.lines:
                note(ax, missing)
        legend_above(fig, axes[0], columns=3)
    return fig


def _draw_seeds_and_mean(
    ax: Axes, curves: list[np.ndarray], number: int, label: str, **of_mean
) -> None:
    """Draws curves (points, 2), one per seed, thin, and their mean as far as the shortest goes.

    number: of the line in the panel, which chooses its look.
    """
    colour = COLOURS[number % len(COLOURS)]
    if len(curves) > 1:
        thin = {"linewidth": 0.6, "alpha": 0.6, "marker": "", "linestyle": "-"}
        for seed, curve in enumerate(curves, 1):
            ax.plot(*curve.T, color=colour, label=f"_{label}, seed {seed} of {len(curves)}", **thin)
    shortest = min(map(len, curves))
    mean = np.mean([curve[:shortest] for curve in curves], axis=0)
    ax.plot(
        *mean.T,
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        linestyle=LINES[number % len(LINES)],
        label=f"{label} (n={len(curves)})",
        **of_mean,
    )


# ---------------------------------------------------------------- information by depth


def depth_information(
    record: Any, about: str = "class", corrected: bool = True, prefix: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the normalised information of class (or position) and expert in each block.

    (M,) 1-based blocks and (M,) values, shallow to deep. The class table counts one sample per test
    image, since the tokens of an image are not independent draws. prefix: tokens before the patches
    (the class token), which have no position. Raises ValueError for another word in `about`.
    """
    if about not in ("class", "position"):
        raise ValueError(f"about={about!r} is unknown: use 'class' or 'position'")
    tables = record.arrays[f"{about}_expert"]  # (M, rows, E)
    if about == "position":
        tables = tables[:, prefix:]
    samples = record.test["n"] if about == "class" else None
    of_layers = [information(table, samples=samples) for table in tables]
    values = np.array([i.corrected if corrected else i.normalised for i in of_layers])
    return np.array([number(m["block"]) for m in record.moe]), values


def information_by_depth(
    records_of_label: dict[str, Sequence[Any]],
    threshold: float | None = None,
    missing: str = "no record yet",
) -> Figure:
    """Draws the information of expert with class, and with position, over depth.

    Normalised mutual information: the mean over seeds, and each seed thin. records_of_label: one
    record per seed for each line. threshold: dotted line in the class panel, as for
    `suggested_layers`.
    """
    with style():
        fig, axes = figure(1, 2, height=3.4, sharey=True)
        for ax, about in zip(axes[0], ("class", "position"), strict=True):
            ax.set(
                xlabel="block (1 = first)",
                ylabel="information I / H(expert), 0 to 1",
                title=f"{about} and expert",
            )
            ax.yaxis.set_tick_params(labelleft=True)
            blocks: set[int] = set()
            for i, (label, records) in enumerate(records_of_label.items()):
                curves = [
                    np.stack(depth_information(r, about), axis=1)
                    for r in finished(records)
                    if r.moe
                ]
                if curves:
                    blocks |= {int(block) for block in curves[0][:, 0]}
                    _draw_seeds_and_mean(ax, curves, i, label)
            if blocks:
                ax.set_xticks(range(min(blocks), max(blocks) + 1))
            else:
                note(ax, missing)
            if threshold is not None and about == "class":
                ax.axhline(
                    threshold,
                    color="#555555",
                    linewidth=1,
                    linestyle=":",
                    label=f"threshold {threshold:g}",
                )
        drawn = [np.max(line.get_ydata()) for ax in axes[0] for line in ax.lines]
        top = min(1.0, max([0.1, *drawn]) * 1.1)  # small values are not to lie on the ground
        axes[0, 0].set_ylim(-0.03 * top, 1.03 * top)
        legend_above(fig, axes[0], columns=3)
    return fig


def depth_curve(rows: Sequence[Sequence[float]], label: str) -> Curve:
    """Makes a curve over blocks, counted from 1 at the input, of the mean over seeds.

    rows: (S, M), one row a seed with the values of all M blocks.
    """
    means = [mean_interval(column) for column in zip(*rows, strict=True)]
    return Curve(list(range(1, len(means) + 1)), means, label)
