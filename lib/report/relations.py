"""Draws one quantity against another: points, costs, pairs of experts, clusters and their tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatter, NullLocator, ScalarFormatter

from .style import (
    COLOURS,
    LINES,
    MAP,
    MARKERS,
    figure,
    legend_above,
    number,
    print_values,
    style,
)

__all__ = ["Spot", "cluster_tree", "clouds", "front", "matrices", "scatter", "surface"]


def scatter(
    panels: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> Figure:
    """Draws one value against another, as points, one panel a comparison: {title: (x, y)}.

    log: makes both axes logarithmic; only x, y > 0 show.
    """
    with style():
        fig, axes = figure(1, len(panels), height=3.0)
        for ax, (title, (x, y)) in zip(axes[0], panels.items(), strict=True):
            ax.plot(x, y, color=COLOURS[0], marker="o", markersize=3.5, linestyle="", alpha=0.6)
            ax.set(title=fill(title, 80 // len(panels)), xlabel=xlabel, ylabel=ylabel)
            if log:
                ax.set(xscale="log", yscale="log")
                for axis in (ax.xaxis, ax.yaxis):  # ticks in plain text: 1e-05
                    axis.set_major_formatter(LogFormatter())
                    axis.set_minor_formatter(LogFormatter())
        return fig


@dataclass(frozen=True)
class Spot:
    """Is one model in `surface`.

    active, stored: its shares of the dense model's compute and storage in percent; top1: accuracy
    in percent; mixture: False for a static model.
    """

    label: str
    active: float
    stored: float
    top1: float
    mixture: bool


def front(costs: Sequence[tuple[float, ...]]) -> list[bool]:
    """Tells which tuples are on the Pareto front: no other is at least as small in all entries.

    Equal tuples are all on it.
    """

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [not any(beats(rival, cost) for rival in costs) for cost in costs]


def surface(panels: dict[str, Sequence[Spot]]) -> Figure:
    """Draws compute, storage and accuracy of many models, one panel a source.

    Accuracy is the colour, squares are static, and models on the `front` of the three are large.
    """
    with style():
        fig, axes = figure(1, len(panels), height=3.8)
        for ax, (title, spots) in zip(axes[0], panels.items(), strict=True):
            # sizes as tables print them: what differs by less is of one size
            is_on_front = front([(round(s.active, 1), round(s.stored, 1), -s.top1) for s in spots])
            low, high = min(s.top1 for s in spots), max(s.top1 for s in spots)
            if low == high:  # one scale for both kinds, of one accuracy, too
                low, high = low - 0.5, high + 0.5
            for mixture, marker in ((False, "s"), (True, "o")):
                chosen = [i for i, spot in enumerate(spots) if spot.mixture == mixture]
                points = ax.scatter(
                    [spots[i].active for i in chosen],
                    [spots[i].stored for i in chosen],
                    c=[spots[i].top1 for i in chosen],
                    marker=marker,
                    s=[70 if is_on_front[i] else 24 for i in chosen],
                    cmap=MAP,
                    vmin=low,
                    vmax=high,
                    edgecolor="#333333",
                    linewidth=0.6,
                    zorder=3,
                    label="mixture" if mixture else "static",
                )
            ends = np.geomspace(min(s.active for s in spots), max(s.active for s in spots), 30)
            ax.plot(
                ends,
                ends,
                color="#888888",
                linewidth=0.8,
                linestyle=LINES[1],
                marker="",
                label="stores what it computes",
            )
            ax.scatter(
                [], [], s=70, color="white", edgecolor="#333333", label="large: on the front of all"
            )
            # most models store about what the dense one does, a few many times that
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_locator(
                FixedLocator([25, 50, 75, 100, 150, 200, 300, 400, 600, 800, 1600])
            )
            ax.yaxis.set_major_formatter(ScalarFormatter())
            ax.yaxis.set_minor_locator(NullLocator())
            ax.axhline(100, color="#888888", linewidth=0.8)
            ax.set(
                title=title,
                xlabel="multiply-adds (% of dense)",
                ylabel="stored parameters (% of dense)",
            )
            fig.colorbar(points, ax=ax, label="accuracy (%)", aspect=24)
        legend_above(fig, axes[0])
    return fig


def matrices(panels: dict[str, Sequence[Sequence[float]]], label: str, low: float = 0.0) -> Figure:
    """Draws square tables of pairs of experts, one panel a layer; colours go from `low` to 1.

    label: what the values are. They are printed where there is room.
    """
    with style():
        fig, axes = figure(1, len(panels), height=2.6, width=min(7.2, 1.2 + 2.0 * len(panels)))
        for ax, (title, table) in zip(axes[0], panels.items(), strict=True):
            table = np.array(table)
            image = ax.imshow(table, vmin=low, vmax=1.0)
            ax.set(title=title, xlabel="expert", ylabel="expert")
            shown = range(0, len(table), 1 if len(table) <= 8 else max(4, len(table) // 4))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_ticks(shown, map(number, shown))
            ax.grid(False)
            if len(table) <= 6:
                print_values(ax, image, table, _short, 7)
        fig.colorbar(image, ax=list(axes[0]), label=label, aspect=18)
    return fig


def _short(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".")


def clouds(
    points_of_label: dict[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str
) -> Figure:
    """Draws several sets of points in one panel, by colour and marker: {label: (x, y)}.

    The first is the ground, small and grey.
    """
    ground = {"color": "#b8b8b8", "marker": "o", "markersize": 2}
    looks = [
        {"color": colour, "marker": marker, "markersize": 3.5}
        for colour, marker in zip(COLOURS, MARKERS, strict=True)
    ]
    with style():
        fig, axes = figure(height=3.6, width=5.4)
        for i, (label, (x, y)) in enumerate(points_of_label.items()):
            look = looks[(i - 1) % len(looks)] if i else ground
            axes[0, 0].plot(x, y, linestyle="", alpha=0.7, label=label, **look)
        axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
        legend_above(fig, [axes[0, 0]])
    return fig


def cluster_tree(tree: np.ndarray, tokens: int) -> Figure:
    """Draws HDBSCAN's condensed tree: a bar a branch, over density (1 / distance).

    tree: an array with the fields parent, child, lambda_val, child_size; tokens: how many were
    clustered, which is also the number of the root. A bar is as wide as its share of the tokens.
    """
    branches = tree[tree["child_size"] > 1]
    start = {tokens: 0.0} | {int(row["child"]): float(row["lambda_val"]) for row in branches}
    size = {tokens: tokens} | {int(row["child"]): int(row["child_size"]) for row in branches}
    centre: dict[int, float] = {}

    def put(node: int, left: float) -> None:
        """Places a branch from `left` on, and those that leave it within its width."""
        centre[node] = left + size[node] / tokens / 2
        for child in (int(row["child"]) for row in branches if row["parent"] == node):
            put(child, left)
            left += size[child] / tokens

    put(tokens, 0.0)
    with style():
        fig, axes = figure(height=3.4, width=5.4)
        for node, x in centre.items():
            ends = tree["lambda_val"][tree["parent"] == node]
            end = float(ends[np.isfinite(ends)].max(initial=start[node]))
            axes[0, 0].bar(
                x,
                end - start[node],
                size[node] / tokens,
                bottom=start[node],
                color=COLOURS[0],
                alpha=0.35,
                edgecolor=COLOURS[0],
                linewidth=0.8,
            )
        axes[0, 0].set(xlabel="share of the tokens", ylabel="density (1 / distance)", xlim=(0, 1))
        axes[0, 0].invert_yaxis()
    return fig
