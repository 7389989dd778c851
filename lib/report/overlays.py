"""Draws images with the expert of each patch over them, and with them what a page shows of images.

Axis letters: **M** MoE layers from the shallowest to the deepest, **E** experts, **P** probe
images, **N** tokens (prefix tokens first), **h**, **w** height and width. Blocks and
experts are printed by their `style.number`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import WIDTH, centred_text, expert_colours, figure, number, style

OPACITY = 0.6  # of an expert's colour over the image

__all__ = [
    "as_picture",
    "bare",
    "draw_dimmed",
    "expert_bar",
    "row_name",
    "spread",
    "tiles_in_words",
    "token_grid",
    "token_maps",
    "token_view",
]


def spread(count: int, most: int = 4) -> list[int]:
    """Chooses up to `most` of `count` layers, evenly spaced, the first and the last included."""
    if not count:
        return []
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def as_picture(image: np.ndarray) -> np.ndarray:
    """Turns any usual image into (h, w, 3) floats in 0..1.

    It may be (h, w), channels last or first, uint8 or floats in 0..1; ValueError for other shapes.
    """
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
    """Finds the rows and columns of the patches among `tokens`; a square unless `grid` is given.

    Raises ValueError where the patches do not fill it.
    """
    side = int(round((tokens - prefix) ** 0.5))
    grid = grid or (side, side)
    if grid[0] * grid[1] != tokens - prefix or tokens <= prefix:
        raise ValueError(
            f"{tokens} tokens with {prefix} prefix tokens do not fill a {grid[0]} x {grid[1]} "
            "grid: give prefix (class and register tokens) and, for images that are not square, "
            "grid=(rows, columns)"
        )
    return grid


def token_view(
    ax: Axes,
    image: np.ndarray | None,
    expert_of_token: np.ndarray,
    experts: int,
    *,
    prefix: int = 1,
    grid: tuple[int, int] | None = None,
    highlight: int | None = None,
) -> None:
    """Draws one image with the expert of each patch over it, or the experts alone for no image.

    expert_of_token: (N,) first choices, -1 = none. highlight: colours the patches of this expert
    only. Prefix tokens have no place in the image; the first is named below it. Numbers are printed
    up to an 8 x 8 grid, and once if all patches agree.
    """
    rows, columns = token_grid(len(expert_of_token), prefix, grid)
    if image is None:
        ax.set_aspect("equal")
    else:
        draw_dimmed(ax, image, rows, columns)
    opacity = 1 if image is None else OPACITY
    colours = expert_colours(experts)
    expert_of_patch = np.asarray(expert_of_token)[prefix:].reshape(rows, columns)
    all_agree = np.ptp(expert_of_patch) == 0
    for (i, j), expert in np.ndenumerate(expert_of_patch):
        if expert < 0 or (highlight is not None and expert != highlight):
            continue
        ax.add_patch(
            Rectangle(
                (j, i),
                1,
                1,
                facecolor=colours[expert],
                alpha=opacity,
                edgecolor="white",
                linewidth=0 if all_agree else 0.5,
            )
        )
        if max(rows, columns) <= 8 and not all_agree:
            _print_expert(ax, j + 0.5, i + 0.5, expert, colours[expert], opacity, 8)
    expert = int(expert_of_patch[0, 0])
    if all_agree and expert >= 0 and highlight in (None, expert):
        _print_expert(ax, columns / 2, rows / 2, expert, colours[expert], opacity, 13)
    if prefix and expert_of_token[0] >= 0:
        ax.set_xlabel(f"class token: {number(expert_of_token[0])}", fontsize=8, labelpad=2)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    bare(ax)


def draw_dimmed(ax: Axes, image: np.ndarray, rows: int, columns: int) -> None:
    """Draws an image in light grey below its grid of patches, of which each is 1 x 1 in the axes.

    Its contrast is stretched, so that shapes of a dark or pale image stay visible below colours.
    """
    picture = as_picture(image)
    height, width = picture.shape[:2]
    grey = picture @ [0.299, 0.587, 0.114]
    darkest, lightest = np.percentile(grey, [1, 99])
    grey = np.clip((grey - darkest) / max(lightest - darkest, 1e-6), 0, 1)
    ax.imshow(
        0.4 + 0.6 * np.repeat(grey[..., None], 3, -1),
        extent=(0, columns, rows, 0),
        aspect=height * columns / (width * rows),
    )


def bare(ax: Axes) -> None:
    """Takes ticks, grid and frame away, which say nothing of a picture."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _print_expert(
    ax: Axes, x: float, y: float, expert: int, colour, opacity: float, size: float
) -> None:
    # what the eye sees: the colour over the image, whose pixels are 0.7 or so
    background = opacity * np.array(colour) + (1 - opacity) * 0.7
    centred_text(ax, x, y, str(number(expert)), background, size)


def token_maps(
    images: Sequence[np.ndarray] | None,
    token_expert: np.ndarray,
    blocks: Sequence[int],
    experts: int,
    *,
    names: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    prefix: int = 1,
    grid: tuple[int, int] | None = None,
) -> Figure:
    """Draws images with the first-choice expert of each patch, a row an image, a column a layer.

    images: (P, ...) in any usual layout, None to draw the experts alone; token_expert: (M, P, N);
    blocks: (M,) 0-based blocks; names: (P,) row labels. layers: indices into M, default up to four,
    spread. The colour bar names the experts; small grids print numbers as well. Raises ValueError
    for shapes that do not fit.
    """
    token_expert = np.asarray(token_expert)
    count = token_expert.shape[1] if images is None else len(images)
    if token_expert.ndim != 3 or token_expert.shape[:2] != (len(blocks), count) or not count:
        raise ValueError(
            f"token_expert must be (M, P, N) for {len(blocks)} blocks and {count} images, "
            f"got {token_expert.shape}"
        )
    chosen = spread(len(blocks)) if layers is None else list(layers)
    titles = [f"block {number(blocks[layer])}" for layer in chosen]
    if images is not None:
        titles.insert(0, "image")
    columns = len(titles)
    side = (WIDTH - 0.9) / max(columns, 4)
    with style():
        fig, axes = figure(
            count,
            columns,
            height=0.5 + count * (side + 0.22),
            width=0.9 + side * columns,
        )
        for p, row in enumerate(axes):
            image = None if images is None else images[p]
            if image is not None:
                row[0].imshow(as_picture(image))
                bare(row[0])
            row[0].set_ylabel(row_name(f"image {p}" if names is None else names[p]), fontsize=8.5)
            for ax, layer in zip(row[columns - len(chosen) :], chosen, strict=True):
                token_view(ax, image, token_expert[layer, p], experts, prefix=prefix, grid=grid)
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        tiles = token_expert[chosen][..., prefix:]
        expert_bar(fig, list(axes.ravel()), experts, tiles_in_words(tiles, images is not None))
    return fig


def row_name(name: str) -> str:
    """Breaks the name of a row of pictures into lines that are no longer than the row is high."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name).replace("_", " "))
    return fill(spaced, 16)


def tiles_in_words(expert_of_patch: np.ndarray, over_image: bool) -> str:
    """Says for the bar of experts how tiles differ from it, and what it means where there is none.

    expert_of_patch: of any shape, -1 = none.
    """
    remarks = ["paler over an image"] * over_image
    if (np.asarray(expert_of_patch) < 0).any():
        remarks.append("no tile: no expert")
    return "; ".join(remarks)


def expert_bar(fig: Figure, axes: list[Axes], experts: int, remark: str = "") -> None:
    """Puts the colours of the experts below the axes, as a bar with their numbers.

    remark: what a reader must know of the colours in the figure.
    """
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
        label=f"expert ({remark})" if remark else "expert",
    )
    shown = range(0, experts, 1 if experts <= 16 else experts // 8)
    bar.set_ticks(shown, labels=list(map(number, shown)))
    bar.ax.grid(False)
