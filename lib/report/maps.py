"""Draws where classes go: heatmaps and loads, from the tables that a record keeps.

Axis letters: **M** MoE layers from the shallowest to the deepest, **C** classes, **E** experts.
Blocks and experts are printed by their `style.number`.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ..measure.routing import load_share
from ..verdicts.routes import images_by_expert
from ..verdicts.routing import information, max_vio
from .overlays import as_picture, bare, row_name, spread
from .probes import probe_images, probe_names
from .style import WIDTH, centred_text, expert_colours, figure, number, style

__all__ = [
    "class_expert_counts",
    "class_expert_heatmap",
    "class_names",
    "class_order",
    "classes_by_expert",
    "counts_of_routing",
    "expert_loads",
    "reconstructions",
    "spread",
]


def class_order(share: np.ndarray) -> np.ndarray:
    """Orders the classes (C,) of a share table (C, E) so that blocks show.

    By favourite expert, then by falling share.
    """
    return np.lexsort((-share.max(1), share.argmax(1)))


def _layers(record: Any, layers: Sequence[int] | None) -> list[int]:
    """Checks indices into the MoE layers and makes them positive; None: up to four, spread."""
    count = len(record.moe)
    if not count:
        raise ValueError(f"record {record.id} has no MoE layer: give a record whose spec has moe")
    if layers is None:
        return spread(count)
    if not layers or not all(-count <= layer < count for layer in layers):
        raise ValueError(
            f"layers={list(layers)} must be some of 0..{count - 1} "
            "(shallow to deep; negative from the end)"
        )
    return [layer % count for layer in layers]


def class_names(record: Any, classes: int) -> list[str]:
    """Lists the names of the classes as a page prints them; numbers where a record has none."""
    names = getattr(record, "class_names", None) or [f"class {c}" for c in range(classes)]
    return [str(name).replace("_", " ") for name in names]


def class_expert_heatmap(record: Any, layers: Sequence[int] | None = None) -> Figure:
    """Draws the share of each class's images (or tokens) that each expert gets, a panel a layer.

    After ViMoE, Figures 5 and 7. Rows are classes, named, in one order for all panels, which brings
    together those with the same favourite in the deepest panel. Experts are ordered within a panel
    by the rows they serve, so that specialisation shows as a diagonal. Above each panel: normalised
    information I / H(expert), corrected for the finite test split. layers: indices into the MoE
    layers, default up to four, spread.
    """
    chosen = _layers(record, layers)
    counts = record.arrays["class_expert"]
    tables = [load_share(counts[i][:, : len(record.moe[i]["load"])]) for i in chosen]
    order = class_order(tables[-1])
    classes = len(order)
    # 0.125 inch a row leaves a 7-point name readable; a hundred classes make one tall figure
    row_height, name_size = (0.125, 7) if classes > 40 else (0.2, 8.5)
    favourites = tables[-1][order].argmax(1)
    edges = np.flatnonzero(np.diff(favourites)) + 0.5  # where the favourite expert changes
    with style():
        fig, axes = figure(
            1,
            len(chosen),
            height=1.8 + row_height * classes,
            sharey=True,
            width_ratios=[max(table.shape[1], 2) for table in tables],
        )
        for ax, layer, table in zip(axes[0], chosen, tables, strict=True):
            image = _draw_shares(ax, table[order], edges)
            value = information(counts[layer], samples=record.test["n"]).corrected
            block = number(record.moe[layer]["block"])
            ax.set(title=f"block {block}\nI/H = {value:.2f}", xlabel="expert")
        names = class_names(record, classes)
        axes[0, 0].set_yticks(range(classes), [names[c] for c in order], fontsize=name_size)
        axes[0, 0].set_ylabel("class")
        fig.colorbar(
            image,
            ax=list(axes[0]),
            location="top",
            aspect=45,
            shrink=0.7,
            pad=0.15 / fig.get_figheight(),
            label=f"share of a class's {_unit_of_routing(record)}\n"
            "(I/H: how much of the expert the class explains, 0 to 1)",
        )
    return fig


def class_expert_counts(records: dict[str, Any]) -> Figure:
    """Draws how many images (or tokens) of each class each expert gets, a panel a model.

    After Durham, Figures 13 and 14. Rows are classes and columns experts of the last MoE layer, in
    their order; the number is that of `counts_of_routing`, the colour its share of the class.
    """
    with style():
        classes = max(len(record.arrays["class_expert"][0]) for record in records.values())
        fig, axes = figure(1, len(records), height=1.9 + 0.24 * classes, sharey=True)
        for ax, (label, record) in zip(axes[0], records.items(), strict=True):
            counts, unit = counts_of_routing(record)
            share = load_share(counts)
            image = ax.imshow(share, vmin=0, vmax=1, aspect="auto")
            for (row, column), count in np.ndenumerate(counts):
                background = image.cmap(share[row, column])[:3]
                centred_text(ax, column, row, str(count), background, 8)
            ax.set(title=f"{fill(label, 24)}\n({unit})", xlabel="expert")
            ax.set_xticks(range(counts.shape[1]), map(number, range(counts.shape[1])))
            ax.set_yticks(range(len(counts)), class_names(record, len(counts)))
            ax.grid(False)
        axes[0, 0].set_ylabel("class")
        fig.colorbar(image, ax=list(axes[0]), label="share of the class", aspect=25)
    return fig


def counts_of_routing(record: Any) -> tuple[np.ndarray, str]:
    """Counts what each expert of the last MoE layer gets of each class, (C, E); also says what is
    counted.

    Images by the expert that gets most of their tokens; tokens where the record does not have them
    by image and they are routed on their own.
    """
    if "image_loads" in record.arrays:
        return images_by_expert(record), "images"
    (last,) = _layers(record, [-1])
    counts = record.arrays["class_expert"][last]
    return counts[:, : len(record.moe[last]["load"])], _unit_of_routing(record)


def _draw_shares(ax: Axes, table: np.ndarray, edges: np.ndarray) -> AxesImage:
    """Draws a share table (C, E), experts by the mean row they serve, with a line at each edge."""
    rows = np.arange(len(table))[:, None]
    mean_row = (table * rows).sum(0) / np.maximum(table.sum(0), 1e-12)
    experts = np.argsort(mean_row, kind="stable")
    image = ax.imshow(table[:, experts], vmin=0, vmax=1, aspect="auto")
    size = 8.5 if len(experts) <= 8 else 6.5
    ax.set_xticks(range(len(experts)), map(number, experts), fontsize=size)
    ax.grid(False)
    ax.tick_params(length=2)
    for edge in edges:
        ax.axhline(edge, color="white", linewidth=0.7)
    return image


def _unit_of_routing(record: Any) -> str:
    """Names what a router decides about: whole images, or tokens."""
    moe = getattr(record.spec, "moe", None)
    return "images" if moe is not None and moe.per_image else "tokens"


def classes_by_expert(record: Any) -> list[dict[str, Any]]:
    """Gives the heatmap of the last MoE layer as rows of a table.

    A row has the expert, its load in percent, and the classes that prefer it with their share.
    """
    (last,) = _layers(record, [-1])
    load = record.moe[last]["load"]
    share = load_share(record.arrays["class_expert"][last][:, : len(load)])
    names, favourite = class_names(record, len(share)), share.argmax(1)
    rows = []
    for expert in range(len(load)):
        share_of_class = share[:, expert]
        classes = np.flatnonzero(favourite == expert)
        classes = sorted(classes, key=lambda c: -share_of_class[c])
        text = ", ".join(f"{names[c]} {100 * share_of_class[c]:.0f}" for c in classes)
        rows.append(
            {
                "expert": number(expert),
                "load (%)": round(100 * load[expert], 1),
                "classes that prefer it (share, %)": text or "none",
            }
        )
    return rows


def expert_loads(record: Any) -> Figure:
    """Draws the share of the assignments that each expert got, stacked, one bar a layer.

    After ViMoE, Figure 6. Above a bar stands its MaxVio.
    """
    _layers(record, None)
    widest = max(len(m["load"]) for m in record.moe)
    with style():
        fig, axes = figure(height=3.8, width=min(WIDTH, 3.2 + 0.6 * len(record.moe)))
        ax = axes[0, 0]
        for x, m in enumerate(record.moe):
            colours, bottom = expert_colours(len(m["load"])), 0.0
            for e, share in enumerate(m["load"]):
                ax.bar(
                    x,
                    100 * share,
                    0.8,
                    bottom=bottom,
                    label=f"_expert {e}",
                    color=colours[e],
                    edgecolor="white",
                    linewidth=0.8,
                )
                if share > 0.04:  # room for a number
                    middle = bottom + 50 * share
                    centred_text(ax, x, middle, str(number(e)), colours[e], 8)
                bottom += 100 * share
            ax.text(x, 101.5, f"{max_vio(m['load']):.2f}", ha="center", va="bottom", fontsize=8)
        ax.set(xlabel="block (1 = first)", ylabel="share of assignments (%)", ylim=(0, 108))
        key = f"in a bar: expert (of {widest})\nabove it: MaxVio, largest load / mean load - 1"
        ax.set_title(key, fontsize=8.5, loc="left")
        ax.set_xticks(range(len(record.moe)), [number(m["block"]) for m in record.moe])
        ax.set_yticks(range(0, 101, 20))
        ax.grid(axis="x", visible=False)
    return fig


def reconstructions(record: Any, shown: int = 6) -> Figure:
    """Draws masked pretraining: probe images, what the encoder sees of them, and reconstructions.

    A row for each of `shown` images. A record keeps the reconstruction, whose visible patches are
    the image's own; the whole image comes from the data set, and its column is left out where that
    is not at hand. Raises ValueError if the record is of no masked pretraining.
    """
    if "picture" not in record.arrays:
        raise ValueError(
            f"record {record.id} holds no reconstructions: give a record whose spec has train.mask"
        )
    pictures, hidden = record.arrays["picture"][:shown], record.arrays["hidden"][:shown]
    images, names = probe_images(record, len(pictures)), probe_names(record)
    side = int(round(hidden.shape[1] ** 0.5))
    columns = ["image"] * (images is not None) + ["seen\n(grey: hidden)", "reconstruction"]
    with style():
        fig, axes = figure(
            len(pictures),
            len(columns),
            height=0.6 + 1.15 * len(pictures),
            width=1.3 * len(columns) + 0.6,
        )
        for i, row in enumerate(axes):
            picture = as_picture(pictures[i])
            patch = np.ones((picture.shape[0] // side, picture.shape[1] // side))
            is_hidden = np.kron(hidden[i].reshape(side, side), patch)[..., None] > 0  # (h, w, 1)
            cells = [np.where(is_hidden, 0.75, picture), picture]
            if images is not None:
                cells.insert(0, as_picture(images[i]))
            for ax, title, cell in zip(row, columns, cells, strict=True):
                ax.imshow(cell)
                bare(ax)
                if i == 0:
                    ax.set_title(title)
            row[0].set_ylabel(row_name(names[i]), fontsize=8.5)
    return fig
