"""Where classes and tokens go: heatmaps, loads and token maps, from the tables that a record keeps.

Axis letters: **M** MoE layers from the shallowest to the deepest, **C** classes, **E** experts,
**P** probe images, **N** tokens (prefix tokens first). Blocks and layers are printed 1-based;
experts keep their number, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..measure.routing import load_share
from ..verdicts.routing import information, max_vio
from .style import WIDTH, expert_colours, figure, style, text_colour

__all__ = [
    "class_expert_heatmap",
    "class_order",
    "classes_by_expert",
    "expert_loads",
    "spread",
    "token_maps",
    "token_view",
]


def spread(count: int, most: int = 4) -> list[int]:
    """Up to `most` of `count` layers, evenly spaced, the first and the last included."""
    return (
        sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})
        if count
        else []
    )


def class_order(share: np.ndarray) -> np.ndarray:
    """Order of the classes (C,) of a share table (C, E) in which blocks show: by favourite expert,
    then by falling share."""
    return np.lexsort((-share.max(1), share.argmax(1)))


def _layers(record: Any, layers: Sequence[int] | None) -> list[int]:
    count = len(record.moe)
    if not count:
        raise ValueError(f"record {record.id} has no MoE layer: give a record whose spec has moe")
    chosen = (
        spread(count)
        if layers is None
        else [i % count if -count <= i < count else None for i in layers]
    )
    if None in chosen or not chosen:
        raise ValueError(
            f"layers={list(layers)} must be some of 0..{count - 1} (shallow to deep; negative from the end)"
        )
    return chosen


def class_names(record: Any, classes: int) -> list[str]:
    names = getattr(record, "class_names", None) or [f"class {c}" for c in range(classes)]
    return [str(name).replace("_", " ") for name in names]


def class_expert_heatmap(record: Any, layers: Sequence[int] | None = None) -> Figure:
    """Share of each class's images (or tokens) that each expert gets, one panel a layer (ViMoE,
    Figures 5 and 7).

    Rows are classes, named, in one order for all panels, which groups them by the expert of the
    deepest panel. Experts are ordered within a panel by the rows they serve, so that specialisation
    shows as a diagonal. Above each panel: normalised information I / H(expert), corrected for the
    finite test split. layers: indices into the MoE layers, default up to four, spread.
    """
    chosen = _layers(record, layers)
    counts = record.arrays["class_expert"]
    tables = [load_share(counts[i][:, : len(record.moe[i]["load"])]) for i in chosen]
    order = class_order(tables[-1])
    classes = len(order)
    # 0.125 inch a row leaves a 7-point name readable; a hundred classes make one tall figure
    row = 0.125 if classes > 40 else 0.2
    with style():
        fig, axes = figure(
            1,
            len(chosen),
            height=1.6 + row * classes,
            sharey=True,
            width_ratios=[max(t.shape[1], 2) for t in tables],
        )
        for ax, layer, table in zip(axes[0], chosen, tables, strict=True):
            table = table[order]
            mean_row = (table * np.arange(classes)[:, None]).sum(0) / np.maximum(
                table.sum(0), 1e-12
            )
            experts = np.argsort(mean_row, kind="stable")
            image = ax.imshow(table[:, experts], vmin=0, vmax=1, aspect="auto")
            value = information(counts[layer], samples=record.test["n"]).corrected
            ax.set(
                title=f"block {record.moe[layer]['block'] + 1}\nI/H = {value:.2f}", xlabel="expert"
            )
            ax.set_xticks(range(len(experts)), experts, fontsize=8.5 if len(experts) <= 8 else 6.5)
            ax.grid(False)
            ax.tick_params(length=2)
            # Thin lines where the favourite expert of the deepest panel changes.
            for edge in np.flatnonzero(np.diff(tables[-1][order].argmax(1))):
                ax.axhline(edge + 0.5, color="white", linewidth=0.7)
        names = class_names(record, classes)
        axes[0, 0].set_yticks(
            range(classes), [names[c] for c in order], fontsize=7 if classes > 40 else 8.5
        )
        axes[0, 0].set_ylabel("class")
        moe = getattr(record.spec, "moe", None)
        unit = "images" if moe is not None and moe.per_image else "tokens"
        fig.colorbar(
            image,
            ax=list(axes[0]),
            location="top",
            aspect=45,
            shrink=0.7,
            pad=0.15 / fig.get_figheight(),
            label=f"share of a class's {unit}",
        )
    return fig


def classes_by_expert(record: Any, layer: int = -1) -> list[dict[str, Any]]:
    """The heatmap of one layer as rows of a table: expert, load in percent, its classes and their
    share."""
    (index,) = _layers(record, [layer])
    load = record.moe[index]["load"]
    share = load_share(record.arrays["class_expert"][index][:, : len(load)])
    names, best = class_names(record, len(share)), share.argmax(1)
    rows = []
    for e in range(len(load)):
        own = sorted(np.flatnonzero(best == e), key=lambda c: -share[c, e])
        text = ", ".join(f"{names[c]} {100 * share[c, e]:.0f}" for c in own)
        rows.append(
            {
                "expert": e,
                "load (%)": round(100 * load[e], 1),
                "classes that prefer it (share, %)": text or "none",
            }
        )
    return rows


def expert_loads(record: Any) -> Figure:
    """Share of the assignments that each expert got, stacked, one bar a layer (ViMoE, Figure 6).
    Above: its MaxVio."""
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
                    color=colours[e],
                    edgecolor="white",
                    linewidth=0.8,
                )
                if share > 0.04:
                    ax.text(
                        x,
                        bottom + 50 * share,
                        str(e),
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=text_colour(colours[e]),
                    )
                bottom += 100 * share
            ax.text(x, 101.5, f"{max_vio(m['load']):.2f}", ha="center", va="bottom", fontsize=8)
        ax.set(xlabel="block (1 = first)", ylabel="share of assignments (%)", ylim=(0, 108))
        ax.set_title(f"in a bar: expert (of {widest})\nabove it: MaxVio", fontsize=8.5, loc="left")
        ax.set_xticks(range(len(record.moe)), [m["block"] + 1 for m in record.moe])
        ax.set_yticks(range(0, 101, 20))
        ax.grid(axis="x", visible=False)
    return fig


# ---------------------------------------------------------------- tokens


def as_picture(image: np.ndarray) -> np.ndarray:
    """Any usual image -> (h, w, 3) floats in 0..1. Takes (h, w), channels last or first, uint8 or
    floats in 0..1."""
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[-1] not in (1, 3):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"an image must be (h, w), (h, w, 1 or 3) or (1 or 3, h, w), got {image.shape}"
        )
    image = image / 255 if image.dtype == np.uint8 else np.clip(image.astype(float), 0, 1)
    return np.broadcast_to(image, (*image.shape[:2], 3))


def token_grid(tokens: int, prefix: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = int(round((tokens - prefix) ** 0.5))
    grid = grid or (side, side)
    if grid[0] * grid[1] != tokens - prefix or tokens <= prefix:
        raise ValueError(
            f"{tokens} tokens with {prefix} prefix tokens do not fill a {grid[0]} x {grid[1]} grid: "
            "give prefix (class and register tokens) and, for images that are not square, grid=(rows, columns)"
        )
    return grid


def token_view(
    ax: Axes,
    image: np.ndarray,
    assignment: np.ndarray,
    experts: int,
    *,
    prefix: int = 1,
    grid: tuple[int, int] | None = None,
    highlight: int | None = None,
) -> None:
    """Draws one image with the expert of each patch over it.

    assignment: (N,) first choices, -1 = no token. highlight: colour the patches of this expert
    only. Prefix tokens have no place in the image and are named below it. Numbers are printed up to
    an 8 x 8 grid, and once if all patches agree.
    """
    rows, columns = token_grid(len(assignment), prefix, grid)
    picture = as_picture(image)
    height, width = picture.shape[:2]
    grey = picture @ [0.299, 0.587, 0.114]
    # A light grey image keeps shapes visible below the colours.
    ax.imshow(
        0.35 + 0.65 * np.repeat(grey[..., None], 3, -1),
        extent=(0, columns, rows, 0),
        aspect=height * columns / (width * rows),
    )
    colours, patches = (
        expert_colours(experts),
        np.asarray(assignment)[prefix:].reshape(rows, columns),
    )
    uniform = np.ptp(patches) == 0
    for (i, j), e in np.ndenumerate(patches):
        if e < 0 or (highlight is not None and e != highlight):
            continue
        ax.add_patch(
            Rectangle(
                (j, i),
                1,
                1,
                facecolor=colours[e],
                alpha=0.6,
                edgecolor="white",
                linewidth=0 if uniform else 0.5,
            )
        )
        if max(rows, columns) <= 8 and not uniform:
            _number(ax, j + 0.5, i + 0.5, e, colours[e], 8)
    if uniform and patches[0, 0] >= 0 and highlight in (None, int(patches[0, 0])):
        _number(ax, columns / 2, rows / 2, int(patches[0, 0]), colours[patches[0, 0]], 13)
    if prefix and assignment[0] >= 0:
        ax.set_xlabel(f"class token: {int(assignment[0])}", fontsize=8, labelpad=2)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    bare(ax)


def bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _number(ax: Axes, x: float, y: float, expert: int, colour, size: float) -> None:
    ax.text(
        x,
        y,
        str(expert),
        ha="center",
        va="center",
        fontsize=size,
        color=text_colour(0.6 * np.array(colour) + 0.4 * 0.7),
    )


def token_maps(
    images: np.ndarray,
    token_expert: np.ndarray,
    blocks: Sequence[int],
    experts: int,
    *,
    names: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    prefix: int = 1,
    grid: tuple[int, int] | None = None,
) -> Figure:
    """Probe images with the first-choice expert of each patch, a row an image, a column a layer.

    images: (P, ...) in any usual layout; token_expert: (M, P, N); blocks: (M,) 0-based blocks;
    names: (P,) row labels. layers: indices into M, default up to four, spread. The colour bar names
    the experts; small grids print numbers as well.
    """
    token_expert = np.asarray(token_expert)
    if (
        token_expert.ndim != 3
        or len(images) != token_expert.shape[1]
        or len(blocks) != len(token_expert)
        or not len(images)
    ):
        raise ValueError(
            f"token_expert must be (M, P, N) for {len(blocks)} blocks and {len(images)} images, "
            f"got {token_expert.shape}"
        )
    chosen = spread(len(blocks)) if layers is None else list(layers)
    columns = 1 + len(chosen)
    side = (WIDTH - 0.9) / max(columns, 4)
    with style():
        fig, axes = figure(
            len(images),
            columns,
            height=0.5 + len(images) * (side + 0.22),
            width=0.9 + side * columns,
        )
        for p, row in enumerate(axes):
            row[0].imshow(as_picture(images[p]))
            bare(row[0])
            row[0].set_ylabel(
                str(names[p]).replace("_", " ") if names is not None else f"image {p}", fontsize=8.5
            )
            for ax, layer in zip(row[1:], chosen, strict=True):
                token_view(ax, images[p], token_expert[layer, p], experts, prefix=prefix, grid=grid)
        for ax, title in zip(
            axes[0], ["image", *(f"block {blocks[i] + 1}" for i in chosen)], strict=True
        ):
            ax.set_title(title)
        expert_bar(fig, list(axes.ravel()), experts)
    return fig


def expert_bar(fig: Figure, axes: list[Axes], experts: int) -> None:
    mappable = ScalarMappable(
        BoundaryNorm(np.arange(experts + 1) - 0.5, experts), ListedColormap(expert_colours(experts))
    )
    bar = fig.colorbar(
        mappable,
        ax=axes,
        location="bottom",
        aspect=40,
        shrink=0.6,
        pad=0.15 / fig.get_figheight(),
        label="expert (overlay shown paler)",
    )
    bar.set_ticks(range(0, experts, 1 if experts <= 16 else experts // 8))
    bar.ax.grid(False)


def reconstructions(record: Any, shown: int = 6) -> Figure:
    """Masked pretraining: a row for each of `shown` probe images, with the image, what the encoder
    sees, and the reconstruction.

    Raises ValueError if the record is of no masked pretraining. Only the reconstruction stands in
    the record: its visible patches are the image's own, so the first column is left out where
    patches are hidden and the image is not at hand.
    """
    if "picture" not in record.arrays:
        raise ValueError(
            f"record {record.id} holds no reconstructions: give a record whose spec has train.mask"
        )
    pictures, hidden = record.arrays["picture"][:shown], record.arrays["hidden"][:shown]
    images = probe_images(record, len(pictures))
    side = int(round(hidden.shape[1] ** 0.5))
    columns = ["image"] * (images is not None) + ["seen", "reconstruction"]
    with style():
        fig, axes = figure(
            len(pictures),
            len(columns),
            height=0.4 + 1.15 * len(pictures),
            width=1.3 * len(columns) + 0.4,
        )
        for i, row in enumerate(axes):
            picture = as_picture(pictures[i])
            cover = np.kron(
                hidden[i].reshape(side, side),
                np.ones((picture.shape[0] // side, picture.shape[1] // side)),
            )
            seen = np.where(cover[..., None] > 0, 0.75, picture)
            drawn = ([as_picture(images[i][0])] if images is not None else []) + [seen, picture]
            for ax, title, what in zip(row, columns, drawn, strict=True):
                ax.imshow(what)
                bare(ax)
                if i == 0:
                    ax.set_title(title)
    return fig


def probe_images(record: Any, count: int) -> list[tuple[np.ndarray, int]] | None:
    """The record's first probe images with their labels, None where the data set is not at hand."""
    from ..inputs.splits import (
        load_splits,
    )  # images are read only to be looked at; a record needs none of this

    try:
        source = load_splits(record.spec.data).test.source
    except FileNotFoundError:
        return None
    return [
        (source.image(int(row)).numpy(), int(source.labels[row]))
        for row in record.arrays["probe_index"][:count]
    ]
