"""One quantity against another: points, compute against storage, pairs of experts, clusters and
their tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from .style import COLOURS, LINES, MAP, MARKERS, figure, legend_above, style, text_colour

__all__ = ["Spot", "cluster_tree", "clouds", "front", "matrices", "scatter", "surface"]


def scatter(
    panels: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> Figure:
    """One value against another, a point each, one panel a comparison: {title: (x, y)}. log: both
    axes; only x, y > 0 show."""
    with style():
        fig, axes = figure(1, len(panels), height=3.0)
        for ax, (title, (x, y)) in zip(axes[0], panels.items(), strict=True):
            ax.plot(x, y, color=COLOURS[0], marker="o", markersize=3.5, linestyle="", alpha=0.6)
            ax.set(title=fill(title, 80 // len(panels)), xlabel=xlabel, ylabel=ylabel)
            if log:
                ax.set(xscale="log", yscale="log")
        return fig


@dataclass(frozen=True)
class Spot:
    """One model in `surface`: its shares of the dense model's compute and storage in percent, and
    its accuracy in percent."""

    label: str
    active: float
    stored: float
    top1: float
    mixture: bool


def front(costs: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which of the tuples no other one beats in one entry without losing in another; small is good,
    equals are all on it."""
    return [
        not any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine
            for other in costs
        )
        for mine in costs
    ]


def surface(panels: dict[str, Sequence[Spot]]) -> Figure:
    """Compute, storage and accuracy of many models, one panel a source: accuracy is the colour,
    squares are static, and models on the `front` of the three are large."""
    with style():
        fig, axes = figure(1, len(panels), height=3.8)
        for ax, (title, spots) in zip(axes[0], panels.items(), strict=True):
            best = front([(s.active, s.stored, -s.top1) for s in spots])
            low, high = min(s.top1 for s in spots), max(s.top1 for s in spots)
            for mixture, marker in ((False, "s"), (True, "o")):
                own = [(s, on) for s, on in zip(spots, best, strict=True) if s.mixture == mixture]
                drawn = ax.scatter(
                    [s.active for s, _ in own],
                    [s.stored for s, _ in own],
                    c=[s.top1 for s, _ in own],
                    marker=marker,
                    s=[70 if on else 24 for _, on in own],
                    cmap=MAP,
                    vmin=low,
                    vmax=high,
                    edgecolor="#333333",
                    linewidth=0.6,
                    zorder=3,
                    label="mixture" if mixture else "static",
                )
            ends = np.geomspace(min(s.active for s in spots), max(s.active for s in spots), 30)
            ax.plot(ends, ends, color="#888888", linewidth=0.8, linestyle=LINES[1], marker="")
            ax.set_yscale(
                "log", base=2
            )  # most models store about what the dense one does, a few many times that
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
            fig.colorbar(drawn, ax=ax, label="accuracy (%)", aspect=24)
        legend_above(fig, axes[0])
    return fig


def matrices(panels: dict[str, Sequence[Sequence[float]]], label: str, low: float = 0.0) -> Figure:
    """Square tables of pairs of experts, one panel a layer; colours from `low` to 1, values printed
    where there is room."""
    with style():
        fig, axes = figure(1, len(panels), height=2.6, width=min(7.2, 1.2 + 2.0 * len(panels)))
        for ax, (title, table) in zip(axes[0], panels.items(), strict=True):
            table = np.array(table)
            image = ax.imshow(table, vmin=low, vmax=1.0)
            ax.set(title=title, xlabel="expert", ylabel="expert")
            ax.set_xticks(range(0, len(table), 1 if len(table) <= 8 else max(4, len(table) // 4)))
            ax.set_yticks(ax.get_xticks())
            ax.grid(False)
            for (i, j), value in np.ndenumerate(table if len(table) <= 6 else np.empty((0, 0))):
                ax.text(
                    j,
                    i,
                    f"{value:.2f}".replace("0.", "."),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=text_colour(image.cmap(image.norm(value))[:3]),
                )
        fig.colorbar(image, ax=list(axes[0]), label=label, aspect=18)
    return fig


def clouds(
    groups: dict[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str
) -> Figure:
    """Points of several groups in one panel, by colour and marker; the first group is the ground,
    small and grey."""
    with style():
        fig, axes = figure(height=3.6, width=5.4)
        for i, (label, (x, y)) in enumerate(groups.items()):
            look = (
                {"color": "#b8b8b8", "markersize": 2}
                if i == 0
                else {
                    "color": COLOURS[(i - 1) % len(COLOURS)],
                    "marker": MARKERS[(i - 1) % len(MARKERS)],
                    "markersize": 3.5,
                }
            )
            axes[0, 0].plot(x, y, linestyle="", alpha=0.7, label=label, **{"marker": "o"} | look)
        axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
        legend_above(fig, [axes[0, 0]])
    return fig


def cluster_tree(tree: np.ndarray, tokens: int) -> Figure:
    """HDBSCAN's condensed tree, fields parent, child, lambda_val, child_size: a bar a branch over
    density (1 / distance)."""
    branches = tree[tree["child_size"] > 1]
    born = {tokens: 0.0} | {int(row["child"]): float(row["lambda_val"]) for row in branches}
    size = {tokens: tokens} | {int(row["child"]): int(row["child_size"]) for row in branches}
    place: dict[int, float] = {}

    def put(node: int, left: float) -> None:
        place[node] = left + size[node] / tokens / 2
        for child in (int(row["child"]) for row in branches if row["parent"] == node):
            put(child, left)
            left += size[child] / tokens

    put(tokens, 0.0)
    with style():
        fig, axes = figure(height=3.4, width=5.4)
        for node, x in place.items():
            ends = tree["lambda_val"][tree["parent"] == node]
            end = float(ends[np.isfinite(ends)].max(initial=born[node]))
            axes[0, 0].bar(
                x,
                end - born[node],
                size[node] / tokens,
                bottom=born[node],
                color=COLOURS[0],
                alpha=0.35,
                edgecolor=COLOURS[0],
                linewidth=0.8,
            )
        axes[0, 0].set(xlabel="share of the tokens", ylabel="density (1 / distance)", xlim=(0, 1))
        axes[0, 0].invert_yaxis()
    return fig
