"""Draws how a method works, in our own hand: boxes and arrows, no numbers."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .style import centred_text, expert_colours, figure, number, style

__all__ = ["blocks", "moe_layer"]

LINE = {"color": "#333333", "linewidth": 1.1, "marker": ""}  # not the cycle of the plots

# Where the columns of boxes stand; rows are one apart.
TOKENS_X, ROUTER_X, EXPERT_X, SUM_X = 0.6, 3.0, 6.1, 9.6

# Where the parts of a block stand, from its input at the bottom to its output at the top.
IN_Y, NORM_Y, ATTENTION_Y, ADD_Y, SECOND_NORM_Y = 0.0, 1.0, 2.0, 2.9, 3.8
ROUTER_Y, EXPERT_Y, SUM_Y, SECOND_ADD_Y, OUT_Y = 4.9, 6.1, 7.2, 8.1, 9.0
RESIDUAL_X, WEIGHTS_X = -2.35, 2.35  # left and right of the parts, which stand around 0


def moe_layer(experts: int = 3) -> Figure:
    """Draws one MoE layer, read from left to right.

    Its parts: router, dispatcher, experts, shared expert and weighted sum. Raises ValueError for
    fewer than two experts.
    """
    if experts < 2:
        raise ValueError(f"experts={experts}: a drawing of routing needs at least two")
    # experts from the top, the shared one at the bottom
    *expert_rows, shared_row = (float(i) for i in range(experts, -1, -1))
    middle = (expert_rows[0] + expert_rows[-1]) / 2
    router_row = experts + 1.15
    with style(), mpl.rc_context({"text.parse_math": True}):
        fig, axes = figure(height=0.85 * (experts + 2), width=7.4)
        ax = axes[0, 0]
        ax.set(xlim=(-0.4, 10.6), ylim=(-0.6, experts + 1.75), aspect="auto")
        ax.axis("off")
        _box(ax, TOKENS_X, middle, "tokens\n$x$: (T, D)", width=1.6, height=0.8)
        _box(ax, ROUTER_X, router_row, "router\nsoftmax, top-K", width=2.0, height=0.8)
        _box(ax, ROUTER_X, middle, "dispatcher\nsort by expert", width=2.0, height=0.8)
        _box(ax, SUM_X, middle, "sum\n$y$: (T, D)", width=1.5, height=0.8)
        _draw_experts(ax, expert_rows, middle)
        _box(ax, EXPERT_X, shared_row, "shared expert", "#ffffff")
        _draw_router_arrows(ax, experts, middle, router_row)
        _draw_shared_path(ax, shared_row, middle)
    return fig


def blocks(experts: int = 4) -> Figure:
    """Draws a transformer block beside one with experts, at one scale, read from the bottom up.

    After Durham, Figure 1. Both have the same attention; the right one has a router and experts in
    the place of the MLP. Raises ValueError for fewer than two experts.
    """
    if experts < 2:
        raise ValueError(f"experts={experts}: a drawing of routing needs at least two")
    with style():
        fig, axes = figure(1, 2, height=6.2, width=5.8)
        for ax, title in zip(axes[0], ("transformer block", "block with experts"), strict=True):
            # one scale for both panels, whatever stands in them
            ax.set(xlim=(-2.7, 2.9), ylim=(-0.5, 9.5), title=title, xticks=[], yticks=[])
            ax.axis("off")
            _draw_block(ax)
        _draw_mlp(axes[0, 0])
        _draw_mixture(axes[0, 1], experts)
    return fig


def _draw_block(ax: Axes) -> None:
    """Draws what both blocks have: attention, norms, and the residual connections around."""
    parts = {
        IN_Y: "tokens",
        NORM_Y: "norm",
        ATTENTION_Y: "attention",
        ADD_Y: "+",
        SECOND_NORM_Y: "norm",
        SECOND_ADD_Y: "+",
        OUT_Y: "tokens",
    }
    for y, text in parts.items():
        _box(ax, 0, y, text, width=0.5 if text == "+" else 2.2, height=0.5)
    heights = list(parts)
    for below, above in zip(heights, heights[1:], strict=False):
        if below != SECOND_NORM_Y:  # what differs between the blocks stands there
            _arrow(ax, (0, below + 0.27), (0, above - 0.27))
    for start, end in (((IN_Y + NORM_Y) / 2, ADD_Y), ((ADD_Y + SECOND_NORM_Y) / 2, SECOND_ADD_Y)):
        ax.plot([0, RESIDUAL_X, RESIDUAL_X], [start, start, end], linestyle="-", **LINE)
        _arrow(ax, (RESIDUAL_X, end), (-0.27, end))


def _draw_mlp(ax: Axes) -> None:
    """Draws the MLP of the transformer block, which all tokens pass."""
    _box(ax, 0, EXPERT_Y, "MLP", width=2.2, height=0.5)
    _arrow(ax, (0, SECOND_NORM_Y + 0.27), (0, EXPERT_Y - 0.27))
    _arrow(ax, (0, EXPERT_Y + 0.27), (0, SECOND_ADD_Y - 0.27))


def _draw_mixture(ax: Axes, experts: int) -> None:
    """Draws a router, and experts of which a token passes one; dashed are those it does not."""
    _box(ax, 0, ROUTER_Y, "router", width=2.2, height=0.5)
    _box(ax, 0, SUM_Y, "times weight", width=2.2, height=0.5)
    _arrow(ax, (0, SECOND_NORM_Y + 0.27), (0, ROUTER_Y - 0.27))
    _arrow(ax, (0, SUM_Y + 0.27), (0, SECOND_ADD_Y - 0.27))
    step = 3.8 / experts
    for i, colour in enumerate(expert_colours(experts)):
        x = (i - (experts - 1) / 2) * step
        is_passed_by = i == 1
        _box(ax, x, EXPERT_Y, str(number(i)), colour, width=0.8 * step, height=0.5)
        near = 0.25 * x  # arrows leave and reach the boxes around their middle
        _arrow(ax, (near, ROUTER_Y + 0.27), (x, EXPERT_Y - 0.27), dashed=not is_passed_by)
        _arrow(ax, (x, EXPERT_Y + 0.27), (near, SUM_Y - 0.27), dashed=not is_passed_by)
    ax.plot([1.12, WEIGHTS_X, WEIGHTS_X], [ROUTER_Y, ROUTER_Y, SUM_Y], linestyle="-", **LINE)
    _arrow(ax, (WEIGHTS_X, SUM_Y), (1.12, SUM_Y))
    ax.text(WEIGHTS_X + 0.1, EXPERT_Y, "weight", fontsize=8.5, rotation=90, va="center")


def _draw_experts(ax: Axes, expert_rows: list[float], middle: float) -> None:
    """Draws each expert, with an arrow from the dispatcher and one, with its weight, to the sum."""
    colours = expert_colours(len(expert_rows))
    for i, y in enumerate(expert_rows):
        _box(ax, EXPERT_X, y, f"expert {number(i)}", colours[i])
        _arrow(ax, (4.05, middle), (5.2, y))
        _arrow(ax, (7.0, y), (8.8, middle + 0.18 * (y - middle)))
        above_or_below = 0.2 if y >= middle else -0.2
        ax.text(
            7.35, y + above_or_below, f"$w_{{{number(i)}}}$", fontsize=9, ha="center", va="center"
        )


def _draw_router_arrows(ax: Axes, experts: int, middle: float, router_row: float) -> None:
    """Draws what the router gets, the tokens, and what it gives: experts, and weights (dashed)."""
    _arrow(ax, (1.45, middle), (1.95, middle))
    _arrow(ax, (0.9, middle + 0.45), (2.0, experts + 1.1))
    _arrow(ax, (ROUTER_X, experts + 0.7), (ROUTER_X, middle + 0.45))
    halfway = (experts + 0.7 + middle + 0.45) / 2
    ax.text(3.12, halfway, "experts", fontsize=8.5, va="center", ha="left")
    ax.plot([4.05, SUM_X], [router_row] * 2, linestyle="--", **LINE)
    _arrow(ax, (SUM_X, router_row), (SUM_X, middle + 0.45), dashed=True)
    ax.text(6.8, experts + 1.3, "weights $w$", fontsize=8.5, ha="center", va="bottom")


def _draw_shared_path(ax: Axes, shared_row: float, middle: float) -> None:
    """Draws the way of all tokens through the shared expert to the sum."""
    ax.plot(
        [TOKENS_X, TOKENS_X, 5.2],
        [middle - 0.45, shared_row, shared_row],
        linestyle="-",
        **LINE,
    )
    _arrow(ax, (5.1, shared_row), (5.2, shared_row))
    ax.plot([7.0, SUM_X], [shared_row] * 2, linestyle="-", **LINE)
    _arrow(ax, (SUM_X, shared_row), (SUM_X, middle - 0.45))
    ax.text(8.3, shared_row + 0.14, "weight 1", fontsize=8.5, ha="center", va="bottom")


def _box(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    colour="#f4f4f4",
    width: float = 1.7,
    height: float = 0.62,
) -> None:
    """Draws a box with a text around the point (x, y)."""
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
    centred_text(ax, x, y, text, colour, 9)


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
