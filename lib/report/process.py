"""Draws how experts are extracted from a layer, step by step, from the data of a real one.

After MoEE, Figure 1. Axis letters: **n** tokens, **H** hidden neurons, **K** clusters.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from .style import COLOURS, MARKERS, figure, legend_above, number, print_values, style

__all__ = ["extraction"]

SHOWN = 6  # clusters at most: as many as there are colours


def extraction(
    view: np.ndarray,
    cluster_of_token: np.ndarray,
    variance: np.ndarray,
    kept_neurons: np.ndarray,
    routed: np.ndarray,
) -> Figure:
    """Draws four panels, from clusters of tokens to the routes of tokens to experts.

    The panels: tokens and their clusters; what each neuron varies by on them; which neurons each
    expert keeps; where the router sends the tokens. view: (n, 2) the tokens in two dimensions;
    cluster_of_token: (n,), -1 for none; variance: (K, H) of each neuron on each cluster;
    kept_neurons: (K, H) true where an expert has the neuron; routed: (K, K) share of each cluster's
    tokens by expert. Neurons stand in one order in both panels: by the cluster on which they vary
    most. The K largest clusters, at most six, are drawn, by the
    `style.number` of their experts. Raises ValueError without a cluster.
    """
    if not len(variance):
        raise ValueError(
            "no cluster: nothing was extracted from this layer, so there is no process to draw"
        )
    sizes = np.bincount(cluster_of_token[cluster_of_token >= 0], minlength=len(variance))
    largest = np.argsort(-sizes, kind="stable")[:SHOWN]
    variance, kept_neurons = variance[largest], kept_neurons[largest]
    routed = routed[largest][:, largest]
    order = np.lexsort((-variance.max(axis=0), variance.argmax(axis=0)))
    names = [str(number(cluster)) for cluster in largest]
    with style():
        fig, axes = figure(2, 2, height=5.6)
        token_panel, variance_panel, neuron_panel, route_panel = axes.flat
        _draw_tokens(token_panel, view, cluster_of_token, largest)
        _draw_variance(variance_panel, variance[:, order])
        _draw_kept_neurons(neuron_panel, kept_neurons[:, order])
        _draw_routes(route_panel, routed, names)
        for ax in (variance_panel, neuron_panel, route_panel):
            ax.set_yticks(range(len(names)), names)
            ax.grid(False)
        legend_above(fig, [token_panel], SHOWN)
    return fig


def _draw_tokens(
    ax: Axes, view: np.ndarray, cluster_of_token: np.ndarray, largest: np.ndarray
) -> None:
    """Draws tokens as points; those of no cluster, or of one that is not drawn, are grey."""
    others = view[~np.isin(cluster_of_token, largest)]
    ax.plot(*others.T, color="#b8b8b8", marker="o", markersize=1.5, linestyle="")
    for i, cluster in enumerate(largest):
        ax.plot(
            *view[cluster_of_token == cluster].T,
            color=COLOURS[i],
            marker=MARKERS[i],
            markersize=3,
            linestyle="",
            label=f"cluster {number(cluster)}",
        )
    ax.set(
        title="1  tokens are clustered",
        xlabel="first principal component",
        ylabel="second component",
    )


def _draw_variance(ax: Axes, variance: np.ndarray) -> None:
    """Draws the variance of each neuron on each cluster, colours by its logarithm."""
    positive = variance[variance > 0]
    # A few neurons hardly vary at all: the lowest 2% share a colour, or the scale would be theirs.
    low, high = np.quantile(positive, [0.02, 1.0]) if len(positive) else (0.1, 1.0)
    image = ax.imshow(np.maximum(variance, low), aspect="auto", norm=LogNorm(low, high * 1.001))
    ax.set(
        title="2  neurons vary on each cluster",
        xlabel="neuron, by cluster of most variance",
        ylabel="cluster",
    )
    # the usual labels are formulas, which figures do not read (style)
    ax.figure.colorbar(image, ax=ax, label="variance", aspect=18, format=LogFormatter())


def _draw_kept_neurons(ax: Axes, kept_neurons: np.ndarray) -> None:
    two_colours = ListedColormap(["#f0f0f0", COLOURS[0]])
    ax.imshow(kept_neurons, aspect="auto", cmap=two_colours, vmin=0, vmax=1)
    ax.set(
        title="3  each keeps the most varying (dark)",
        xlabel="neuron, in the same order",
        ylabel="expert",
    )


def _draw_routes(ax: Axes, routed: np.ndarray, names: list[str]) -> None:
    image = ax.imshow(100 * routed, vmin=0, vmax=100)
    print_values(ax, image, 100 * routed, "{:.0f}".format, 8)
    ax.set(
        title="4  a router sends tokens there",
        xlabel="expert",
        ylabel="cluster of the token",
        xticks=range(len(names)),
        xticklabels=names,
    )
    ax.figure.colorbar(image, ax=ax, label="share of tokens (%)", aspect=18)
