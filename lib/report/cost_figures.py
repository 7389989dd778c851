"""Draws accuracy against size and multiply-adds, and counts of ours against those of a table.

Published values and ours are never drawn into one panel, as in `figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..verdicts.stats import Interval
from .errorbars import Value, errorbar
from .relations import front
from .style import COLOURS, figure, legend_above, note, style


@dataclass(frozen=True)
class Point:
    """Is a model of the frontier.

    params_m: active parameters in millions; macs_g: multiply-adds in 10^9 per image; top1: in
    percent; highlight: drawn larger and filled, as the method that the page is about.
    """

    label: str
    params_m: float
    macs_g: float
    top1: Value
    highlight: bool = False


TOLERANCE = 0.005  # of the ratio of two counts that agree
_COSTS = {"params_m": "active parameters (million)", "macs_g": "multiply-adds (10⁹ per image)"}


def frontier(panels: dict[str, Sequence[Point]]) -> Figure:
    """Draws accuracy against active parameters and multiply-adds, one row of panels a source.

    A label has one look in all rows.
    """
    labels = list(dict.fromkeys(p.label for points in panels.values() for p in points))
    markers = "osD^v<>PX*hp"
    with style():
        fig, axes = figure(len(panels), 2, height=0.4 + 2.9 * len(panels), sharey="row")
        fig.get_layout_engine().set(hspace=0.08)  # a title is not to touch the axis above it
        for row, (title, points) in zip(axes, panels.items(), strict=True):
            for ax, (key, xlabel) in zip(row, _COSTS.items(), strict=True):
                ax.set(xlabel=xlabel, ylabel="top-1 accuracy (%)", title=fill(title, 32))
                ax.yaxis.set_tick_params(labelleft=True)
                drawn, seen = False, set()
                for p in points:
                    i = labels.index(p.label)
                    colour = COLOURS[i % len(COLOURS)]
                    drawn |= errorbar(
                        ax,
                        [getattr(p, key)],
                        [p.top1],
                        color=colour,
                        # one on at each lap, so that no colour has one marker twice
                        marker=markers[(i + i // len(markers)) % len(markers)],
                        markersize=9 if p.highlight else 6,
                        markeredgecolor=colour,
                        linestyle="",
                        markerfacecolor=colour if p.highlight else "white",
                        zorder=4 if p.highlight else 3,
                        label=None if p.label in seen else p.label,
                    )
                    seen.add(p.label)
                ax.margins(0.12)
                # small models have long numbers, which must not touch
                ax.xaxis.set_major_locator(MaxNLocator(nbins=3))
                ax.ticklabel_format(axis="x", useOffset=False)
                values = [getattr(p, key) for p in points if p.top1 is not None]
                if values and max(values) - min(values) < 0.04 * max(values):
                    # models of one size stay one size to the eye: no axis of millionths
                    middle = (max(values) + min(values)) / 2
                    ax.set_xlim(0.95 * middle, 1.05 * middle)
                if not drawn:
                    note(ax, "no record yet")
            if row[1].get_legend_handles_labels()[1]:
                row[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    return fig


@dataclass(frozen=True)
class Priced:
    """Is a model with several costs.

    family: what the legend calls it; models of one family, such as a method at two sizes, are
    joined by a thin line. reference: drawn in black, as what the others are compared with. costs:
    by the label of an axis; one that was not measured is absent.
    """

    family: str
    top1: Interval
    costs: Mapping[str, float]
    reference: bool = False


def fronts(models: Sequence[Priced], axes: Sequence[str]) -> Figure:
    """Draws accuracy against each cost, a panel each, with the front of models that none beats.

    A step is what can be had for a cost: models on it are filled, those that another one beats at
    no more cost are hollow.
    """
    looks: dict[str, tuple[str, str]] = {}
    for model in models:
        colours, shapes = (["black"], "+x") if model.reference else (COLOURS, "osD^v<>PX*h")
        i = sum(colour in colours for colour, _ in looks.values())
        # a shape on at each lap of the colours, so that no colour has one shape twice
        look = colours[i % len(colours)], shapes[(i + i // len(COLOURS)) % len(shapes)]
        looks.setdefault(model.family, look)
    with style():
        rows = (len(axes) + 1) // 2
        fig, panels = figure(rows, 2, height=1.4 + 2.5 * rows, sharey=True)
        for ax, cost in zip(panels.flat, axes, strict=False):
            ax.set(xlabel=cost, ylabel="test top-1 (%)")
            ax.yaxis.set_tick_params(labelleft=True)
            priced = [model for model in models if cost in model.costs]
            if priced:
                _front(ax, cost, priced, looks)
            else:
                note(ax, "not measured")
        for ax in panels.flat[len(axes) :]:
            ax.set_visible(False)
        legend_above(fig, panels.flat, columns=3)
    return fig


def _front(ax, cost: str, models: Sequence[Priced], looks: Mapping[str, tuple[str, str]]) -> None:
    """Draws one panel of `fronts`: the step, families, and a mark for each model."""
    xs = [model.costs[cost] for model in models]
    means = [model.top1.mean for model in models]
    on_front = front([(x, -mean) for x, mean in zip(xs, means, strict=True)])
    best = sorted((i for i, is_best in enumerate(on_front) if is_best), key=xs.__getitem__)
    right = max(xs) + 0.05 * (max(xs) - min(xs) or 1.0)
    ax.step(
        [*(xs[i] for i in best), right],
        [*(means[i] for i in best), means[best[-1]]],
        where="post",
        color="#999999",
        linewidth=1.2,
        marker="",
        linestyle="-",
        label="best for the cost",
    )
    for family, (colour, _) in looks.items():
        of_family = [i for i, model in enumerate(models) if model.family == family]
        ends = [(xs[i], means[i]) for i in sorted(of_family, key=xs.__getitem__)]
        if len(ends) > 1:
            ax.plot(*zip(*ends, strict=True), color=colour, linewidth=0.7, marker="", linestyle="-")
    for place, model in enumerate(models):
        colour, shape = looks[model.family]
        errorbar(
            ax,
            xs[place : place + 1],
            [model.top1],
            color=colour,
            marker=shape,
            markersize=9 if model.reference else 6.5,
            markeredgecolor=colour,
            markerfacecolor=colour if on_front[place] else "white",
            linestyle="",
            label=model.family,
            zorder=3,
        )
    ax.margins(0.1)


def cost_ratio(ratios: dict[str, float]) -> Figure:
    """Draws the ratio of our count to the printed one, a dot a cell of a table.

    A dot is filled where it lies within TOLERANCE of 1. Raises ValueError without a ratio.
    """
    if not ratios:
        raise ValueError("ratios is empty: give {cell: ours / paper}")
    names, values = list(ratios), np.array(list(ratios.values()), float)
    close = np.abs(values - 1) <= TOLERANCE
    rows = np.arange(len(names))
    with style():
        fig, axes = figure(height=1.0 + 0.2 * len(names))
        ax = axes[0, 0]
        ax.axvspan(
            1 - TOLERANCE, 1 + TOLERANCE, color="#dfe6ee", label=f"within {100 * TOLERANCE:g}%"
        )
        ax.axvline(1, color="#555555", linewidth=1)
        ax.plot(values[close], rows[close], "o", color=COLOURS[0], linestyle="", label="agrees")
        ax.plot(
            values[~close],
            rows[~close],
            "s",
            color=COLOURS[2],
            markerfacecolor="white",
            linestyle="",
            label="_" if close.all() else "differs",
        )
        ax.set(
            xlabel="ours / paper",
            ylabel="cell of the table",
            yticks=rows,
            yticklabels=names,
            ylim=(len(names) - 0.5, -0.5),
        )
        legend_above(fig, [ax], columns=3)
    return fig
