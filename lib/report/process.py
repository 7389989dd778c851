"""How experts are cut out of a layer, step by step, drawn from the data of a real one (MoEE, Figure
1).

Axis letters: **n** tokens, **H** hidden neurons, **K** clusters.
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from .style import COLOURS, MARKERS, figure, style, text_colour

__all__ = ["extraction"]

SHOWN = 6  # clusters at most: as many as there are colours


def extraction(
    view: np.ndarray, labels: np.ndarray, variance: np.ndarray, kept: np.ndarray, routed: np.ndarray
) -> Figure:
    """Four panels: tokens and their clusters, what each neuron varies by on them, which ones each
    expert keeps, and where the router sends the tokens.

    view: (n, 2) the tokens in two dimensions; labels: (n,) cluster of each, -1 for none; variance:
    (K, H) of each neuron on each cluster; kept: (K, H) true where an expert has the neuron; routed:
    (K, K) share of each cluster's tokens by expert. Neurons stand in one order in both panels: by
    the cluster on which they vary most. The K largest clusters, at most six, are drawn. Raises
    ValueError without a cluster.
    """
    if not len(variance):
        raise ValueError(
            "no cluster: nothing was cut out of this layer, so there is no process to draw"
        )
    largest = np.argsort(-np.bincount(labels[labels >= 0], minlength=len(variance)), kind="stable")[
        :SHOWN
    ]
    variance, kept, routed = variance[largest], kept[largest], routed[largest][:, largest]
    order = np.lexsort((-variance.max(axis=0), variance.argmax(axis=0)))
    names = [str(k) for k in largest]
    with style():
        fig, axes = figure(2, 2, height=5.6)
        tokens, spread, chosen, sent = axes.flat
        tokens.plot(
            *view[~np.isin(labels, largest)].T,
            color="#b8b8b8",
            marker="o",
            markersize=1.5,
            linestyle="",
        )
        for i, k in enumerate(largest):
            tokens.plot(
                *view[labels == k].T,
                color=COLOURS[i],
                marker=MARKERS[i],
                markersize=3,
                linestyle="",
                label=names[i],
            )
        tokens.set(
            title="1  tokens are clustered",
            xlabel="first principal component",
            ylabel="second component",
        )
        tokens.legend(
            title="cluster",
            fontsize=7.5,
            title_fontsize=7.5,
            markerscale=1.3,
            ncols=2,
            handletextpad=0.1,
        )
        positive = variance[variance > 0]
        low, high = np.quantile(positive, [0.02, 1.0]) if len(positive) else (0.1, 1.0)
        image = spread.imshow(
            np.maximum(variance[:, order], low), aspect="auto", norm=LogNorm(low, high * 1.001)
        )
        spread.set(
            title="2  neurons vary on each cluster",
            xlabel="neuron, by cluster of most variance",
            ylabel="cluster",
        )
        fig.colorbar(image, ax=spread, label="variance", aspect=18)
        chosen.imshow(
            kept[:, order],
            aspect="auto",
            cmap=ListedColormap(["#f0f0f0", COLOURS[0]]),
            vmin=0,
            vmax=1,
        )
        chosen.set(
            title="3  each cluster keeps the most varying",
            xlabel="neuron, in the same order",
            ylabel="expert",
        )
        image = sent.imshow(100 * routed, vmin=0, vmax=100)
        for (i, j), share in np.ndenumerate(100 * routed):
            sent.text(
                j,
                i,
                f"{share:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color=text_colour(image.cmap(image.norm(share))[:3]),
            )
        sent.set(
            title="4  a router sends tokens there",
            xlabel="expert",
            ylabel="cluster of the token",
            xticks=range(len(names)),
            xticklabels=names,
        )
        fig.colorbar(image, ax=sent, label="share of tokens (%)", aspect=18)
        for ax in (spread, chosen, sent):
            ax.set_yticks(range(len(names)), names)
            ax.grid(False)
    return fig
