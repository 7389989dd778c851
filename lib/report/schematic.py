"""Drawings of how a method works, in our own hand: boxes and arrows, no numbers."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .style import expert_colours, figure, style, text_colour

__all__ = ["moe_layer"]


def _box(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    colour="#f4f4f4",
    width: float = 1.7,
    height: float = 0.62,
) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=colour,
            edgecolor="#333333",
            linewidth=1,
        )
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=9, color=text_colour(colour))


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False
) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            linewidth=1.1,
            color="#333333",
            linestyle="--" if dashed else "-",
            shrinkA=0,
            shrinkB=0,
        )
    )


def moe_layer(experts: int = 3) -> Figure:
    """One MoE layer with router, dispatcher, experts, shared expert and weighted sum, read from
    left to right."""
    if experts < 2:
        raise ValueError(f"experts={experts}: a drawing of routing needs at least two")
    colours = expert_colours(experts)
    rows = [
        1.0 * i for i in range(experts, -1, -1)
    ]  # experts from the top, the shared one at the bottom
    middle = (rows[0] + rows[-2]) / 2
    line = {
        "color": "#333333",
        "linewidth": 1.1,
        "linestyle": "-",
        "marker": "",
    }  # not the cycle of the plots
    with style():
        fig, axes = figure(height=0.85 * (experts + 2), width=7.4)
        ax = axes[0, 0]
        ax.set(xlim=(-0.4, 10.6), ylim=(-0.6, experts + 1.75), aspect="auto")
        ax.axis("off")
        _box(ax, 0.6, middle, "tokens\n$x$: (T, D)", width=1.6, height=0.8)
        _box(ax, 3.0, experts + 1.15, "router\nsoftmax, top-K", width=2.0, height=0.8)
        _box(ax, 3.0, middle, "dispatcher\nsort by expert", width=2.0, height=0.8)
        _box(ax, 9.6, middle, "sum\n$y$: (T, D)", width=1.5, height=0.8)
        for i, y in enumerate(rows[:-1]):
            _box(ax, 6.1, y, f"expert {i + 1}", colours[i])
            _arrow(ax, (4.05, middle), (5.2, y))
            _arrow(ax, (7.0, y), (8.8, middle + 0.18 * (y - middle)))
            ax.text(
                7.35,
                y + (0.2 if y >= middle else -0.2),
                f"$w_{i + 1}$",
                fontsize=9,
                ha="center",
                va="center",
            )
        _box(ax, 6.1, rows[-1], "shared expert", "#ffffff")
        _arrow(ax, (1.45, middle), (1.95, middle))
        _arrow(ax, (0.9, middle + 0.45), (2.0, experts + 1.1))
        _arrow(ax, (3.0, experts + 0.7), (3.0, middle + 0.45))
        ax.text(
            3.12,
            (experts + 0.7 + middle + 0.45) / 2,
            "experts",
            fontsize=8.5,
            va="center",
            ha="left",
        )
        ax.plot(
            [4.05, 9.6],
            [experts + 1.15] * 2,
            color="#333333",
            linewidth=1.1,
            linestyle="--",
            marker="",
        )
        _arrow(ax, (9.6, experts + 1.15), (9.6, middle + 0.45), dashed=True)
        ax.text(6.8, experts + 1.3, "weights $w$", fontsize=8.5, ha="center", va="bottom")
        ax.plot([0.6, 0.6, 5.2], [middle - 0.45, rows[-1], rows[-1]], **line)
        _arrow(ax, (5.1, rows[-1]), (5.2, rows[-1]))
        ax.plot([7.0, 9.6], [rows[-1]] * 2, **line)
        _arrow(ax, (9.6, rows[-1]), (9.6, middle - 0.45))
        ax.text(8.3, rows[-1] + 0.14, "weight 1", fontsize=8.5, ha="center", va="bottom")
    return fig
