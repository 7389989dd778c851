"""Draws what single experts see of an image: their masks, and the GradCAM on their patches.

Axis letters: **E** experts, **P** probe images, **N** tokens, **h**, **w** rows and columns of
patches. Blocks and experts are printed by their `style.number`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ..verdicts.masks import CLASS_TOKENS, first_choices
from .overlays import as_picture, bare, draw_dimmed, row_name, token_grid
from .probes import probe_images, probe_names
from .style import WIDTH, figure, number, style

__all__ = ["cam_masks", "cam_shares", "expert_masks", "say_masks"]

MASK = "#1f2f56"  # a patch of the expert, where there is no image to show in it
HEAT = "plasma"  # MAP has grey in its middle, which over a grey image is no colour
OPACITY_OF_HEAT = 0.75  # of a GradCAM over the image


def expert_masks(rows: Sequence[tuple[str, Any, int]], layers: Sequence[int] = (-1,)) -> Figure:
    """Draws the patches of each expert: a row an image of a model, a column an expert of a layer.

    After Leiden, Figures 2, 3 and 5. rows: name of the model ("" for none), its record, and which
    of its probe images. layers: indices into the MoE layers. An expert's patches show the image,
    the others are faded; where images are not at hand the mask stands alone, and no image column.
    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("no rows: give at least one (name, record, probe image)")
    first = rows[0][1]
    columns = [(layer, e) for layer in layers for e in range(len(first.moe[layer]["load"]))]
    images = [probe_images(record) for _, record, _ in rows]
    with_images = all(of_record is not None for of_record in images)
    titles = ["image"] * with_images
    titles += [
        f"block {number(first.moe[layer]['block'])}\nexpert {number(e)}" for layer, e in columns
    ]
    side = (WIDTH - 0.6) / max(len(titles), 5)
    with style():
        fig, axes = figure(
            len(rows),
            len(titles),
            height=0.7 + len(rows) * (side + 0.06),
            width=0.6 + side * len(titles),
        )
        for row, (name, record, probe), of_record in zip(axes, rows, images, strict=True):
            image = of_record[probe] if with_images else None
            if with_images:
                row[0].imshow(as_picture(image))
                bare(row[0])
            label = row_name(probe_names(record)[probe])
            row[0].set_ylabel(f"{name}\n{label}" if name else label, fontsize=8)
            for ax, (layer, expert) in zip(row[len(titles) - len(columns) :], columns, strict=True):
                _draw_mask(ax, image, first_choices(record, layer)[probe] == expert)
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title, fontsize=8.5)
        mask = "clear: patches of the expert; faded: all others"
        fig.supxlabel(mask if with_images else "dark: patches of the expert", fontsize=9.5)
    return fig


def say_masks(rows: Sequence[tuple[str, Any, int]], layers: Sequence[int] = (-1,)) -> str:
    """Says what the figure of `expert_masks` shows: how many images lie with one expert alone."""
    sentences = []
    for layer in layers:
        masks = [first_choices(record, layer)[probe] for _, record, probe in rows]
        whole = sum(int(np.ptp(mask) == 0) for mask in masks)
        block = number(rows[0][1].moe[layer]["block"])
        sentences.append(
            f"In block {block} one expert has all patches in {whole} of {len(masks)} rows."
        )
    return " ".join(sentences)


def _draw_mask(ax: Axes, image: np.ndarray | None, is_of_expert: np.ndarray) -> None:
    """Draws one mask (h, w), true on the patches of the expert."""
    rows, columns = is_of_expert.shape
    if image is None:
        ax.imshow(
            is_of_expert,
            cmap=ListedColormap(["white", MASK]),
            vmin=0,
            vmax=1,
            extent=(0, columns, rows, 0),
        )
    else:
        picture = as_picture(image)
        height, width = picture.shape[:2]
        of_pixel = is_of_expert[np.arange(height) * rows // height]
        of_pixel = of_pixel[:, np.arange(width) * columns // width, None]  # (height, width, 1)
        ax.imshow(np.where(of_pixel, picture, 0.85 + 0.15 * picture), extent=(0, columns, rows, 0))
    _frame(ax, rows, columns)


def _frame(ax: Axes, rows: int, columns: int) -> None:
    """Draws thin lines between patches and around them, and takes ticks away."""
    ax.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    ax.grid(False)
    ax.spines[:].set(visible=True, linewidth=0.5, color="#999999")
    for lines, count in ((ax.axhline, rows), (ax.axvline, columns)):
        for place in range(1, count):
            lines(place, color="#999999", linewidth=0.3)


def cam_shares(
    record: Any,
    layer: int,
    shift: int = 0,
    cam: str = "cam",
    shown: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes (E,) the share of the GradCAM on each expert's patches, and (E,) of the patches.

    shown: over the first so many probe images; None = over all. shift: the patches of an image meet
    the GradCAM of the one that comes so many later, around the end; then places alone can bring the
    two together. cam: as of `cam_masks`. Raises ValueError if the record does not hold it.
    """
    heat = np.roll(_heat_of_patches(record, cam)[:shown], -shift, axis=0)
    experts = range(len(record.moe[layer]["load"]))
    expert_of_patch = first_choices(record, layer)[:shown]  # (P, h, w)
    heat_of_expert = np.array([heat[expert_of_patch == e].sum() for e in experts])
    share_of_patches = np.array([(expert_of_patch == e).mean() for e in experts])
    return heat_of_expert / max(heat_of_expert.sum(), 1e-12), share_of_patches


def cam_masks(record: Any, layer: int = -1, shown: int = 4, cam: str = "cam") -> Figure:
    """Draws probe images, their GradCAM, and the GradCAM on the patches of each expert alone.

    After Leiden, Figure 4; a row an image, which lies dimmed below the heat where it is at hand.
    cam: the GradCAM of the record, "cam" of the last block or "cam_first" of the first. Raises
    ValueError if the record does not hold it.
    """
    heat = _heat_of_patches(record, cam)[:shown]
    expert_of_patch = first_choices(record, layer)[:shown]
    experts = range(len(record.moe[layer]["load"]))
    images, names = probe_images(record, shown), probe_names(record)
    titles = ["image"] * (images is not None) + [
        "GradCAM",
        *(f"expert {number(e)}" for e in experts),
    ]
    side = (WIDTH - 0.6) / max(len(titles), 6)
    with style():
        fig, axes = figure(
            len(heat),
            len(titles),
            height=1.1 + (side + 0.06) * len(heat),
            width=0.6 + side * len(titles),
        )
        for i, row in enumerate(axes):
            image = None if images is None else images[i]
            if image is not None:
                row[0].imshow(as_picture(image))
                bare(row[0])
            row[0].set_ylabel(row_name(names[i]), fontsize=8.5)
            masked = [np.where(expert_of_patch[i] == e, heat[i], np.nan) for e in experts]
            cells = [heat[i], *masked]
            for ax, cell in zip(row[-len(cells) :], cells, strict=True):
                shades = _draw_heat(ax, image, cell)
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        fig.colorbar(
            shades,
            ax=list(axes.ravel()),
            location="bottom",
            aspect=40,
            shrink=0.6,
            pad=0.12 / fig.get_figheight(),
            label="GradCAM of the predicted class, mean over a patch; the largest\n"
            "pixel of an image = 1 (below an expert: on its patches alone)",
        )
    return fig


def _draw_heat(ax: Axes, image: np.ndarray | None, heat: np.ndarray):
    """Draws a GradCAM (h, w), NaN on the patches that are not to be covered."""
    rows, columns = heat.shape
    if image is not None:
        draw_dimmed(ax, image, rows, columns)
        # faded where no heat lies, else grey print could not tell the image from the heat
        ax.imshow(
            np.ones_like(heat),
            cmap="gray",
            vmin=0,
            vmax=1,
            extent=(0, columns, rows, 0),
            alpha=np.where(np.isnan(heat), 0.8, 0.0),
        )
    shades = ax.imshow(
        heat,
        cmap=HEAT,
        vmin=0,
        vmax=1,
        extent=(0, columns, rows, 0),
        alpha=1 if image is None else OPACITY_OF_HEAT,
    )
    _frame(ax, rows, columns)
    return shades


def _heat_of_patches(record: Any, cam: str) -> np.ndarray:
    """Averages a GradCAM over the pixels of each patch: (P, h, w)."""
    if cam not in record.arrays:
        raise ValueError(
            f"record {record.id} holds no GradCAM {cam!r}: give a record whose spec has "
            f"{'cam_probe' if cam == 'cam' else cam}"
        )
    heat = record.arrays[cam].astype(float)
    rows, columns = token_grid(record.arrays["token_expert"].shape[-1], CLASS_TOKENS, None)
    # (P, H, W) pixels -> (P, h, pixels, w, pixels): one cell a patch
    cells = heat.reshape(len(heat), rows, heat.shape[1] // rows, columns, heat.shape[2] // columns)
    return cells.mean(axis=(2, 4))
