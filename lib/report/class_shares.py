"""Draws where the tokens of a few classes go, expert by expert.

After MoEE, Figures 3 and 4. Axis letters: **C** classes, **E** experts. Experts are printed by
their `style.number`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..measure.routing import load_share
from .style import centred_text, expert_colours, figure, number, style

__all__ = ["class_shares"]

READABLE = 0.05  # share of a bar in which a number has room


def class_shares(
    counts_of_layer: Mapping[str, np.ndarray],
    sets_of_classes: Mapping[str, Sequence[int]],
    names: Sequence[str],
) -> Figure:
    """Draws a bar a class, divided by expert: a row of panels a layer, a column a set of classes.

    counts_of_layer: by title, (C, E) tokens of each class by expert; E may differ. names: of all C
    classes. The first bar of a panel is that of all tokens. An expert without a token of any class
    gets no colour.
    """
    rows, columns = len(counts_of_layer), len(sets_of_classes)
    bars = 1 + max(map(len, sets_of_classes.values()))
    with style():
        fig, axes = figure(rows, columns, height=rows * (0.6 + 0.24 * bars), sharex=True)
        for row, (layer, counts) in zip(axes, counts_of_layer.items(), strict=True):
            counts = counts[:, counts.sum(axis=0) > 0]  # records pad layers of fewer experts
            for ax, (of_set, classes) in zip(row, sets_of_classes.items(), strict=True):
                shares = load_share(np.stack([counts.sum(axis=0), *counts[list(classes)]]))
                _draw_bars(ax, shares)
                ax.set_yticks(range(1 + len(classes)), ["all", *(names[c] for c in classes)])
                ax.set(title=f"{layer}, {of_set} classes")
        for ax in axes[:, 0]:
            ax.set_ylabel("class")
        for ax in axes[-1]:
            ax.set(xlabel="share of the class's tokens (%)\nin a bar: expert", xlim=(0, 100))
    return fig


def _draw_bars(ax: Axes, shares: np.ndarray) -> None:
    """Draws shares (bars, E) as stacked horizontal bars, the first on top."""
    colours = expert_colours(shares.shape[1])
    for bar, share in enumerate(shares):
        left = 0.0
        for expert, part in enumerate(share):
            ax.barh(
                bar,
                100 * part,
                0.8,
                left=100 * left,
                label=f"_expert {expert}",
                color=colours[expert],
                edgecolor="white",
                linewidth=0.8,
            )
            if part > READABLE:
                middle = 100 * (left + part / 2)
                centred_text(ax, middle, bar, str(number(expert)), colours[expert], 7.5)
            left += part
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
