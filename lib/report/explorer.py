"""A live look at routing: image, layer and expert as controls, the token overlay as the answer.

On a published page nothing answers to a control, so the same views stand there as a figure: the
explorer displays as widgets where a kernel serves them, and as the static figure where not. For the
second case the display bundle carries both; a book leaves the widget view out by its Sphinx setting
`nb_mime_priority_overrides: [["html", "application/vnd.jupyter.widget-view+json", null]]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .maps import probe_images, token_maps, token_view
from .style import Shown, figure, png, show, style

__all__ = ["Explorer", "explorer", "of_record"]


class Explorer:
    """Shows one image and one layer at a time. `widget` is None without ipywidgets; `static` is
    always there."""

    def __init__(
        self,
        images: np.ndarray,
        token_expert: np.ndarray,
        blocks: Sequence[int],
        experts: int,
        names: Sequence[str],
        prefix: int,
        grid: tuple[int, int] | None,
        static: Shown,
    ):
        self.images, self.token_expert, self.blocks = images, token_expert, list(blocks)
        self.experts, self.names, self.prefix, self.grid, self.static = (
            experts,
            list(names),
            prefix,
            grid,
            static,
        )
        self.widget = self._build()

    def view(self, image: int, layer: int, expert: int | None = None) -> bytes:
        """PNG of one image at one layer (index into the MoE layers); expert: colour its patches
        only."""
        with style():
            fig, axes = figure(height=4.0, width=4.2)
            token_view(
                axes[0, 0],
                self.images[image],
                self.token_expert[layer, image],
                self.experts,
                prefix=self.prefix,
                grid=self.grid,
                highlight=expert,
            )
            patches = self.token_expert[layer, image][self.prefix :]
            patches = patches[patches >= 0]
            count = ""
            if expert is not None:
                count = f", {int((patches == expert).sum())} of {patches.size} patches to expert {expert}"
            axes[0, 0].set_title(f"{self.names[image]}, block {self.blocks[layer] + 1}{count}")
        return png(fig, dpi=110)

    def _build(self) -> Any:
        try:
            import ipywidgets
        except ImportError:
            return None
        picture = ipywidgets.Image(
            format="png", layout={"max_width": "100%"}, value=self.view(0, len(self.blocks) - 1)
        )
        wide = {"description_width": "4em"}
        image = ipywidgets.Dropdown(
            description="image",
            style=wide,
            value=0,
            options=[(n, i) for i, n in enumerate(self.names)],
        )
        layer = ipywidgets.SelectionSlider(
            description="block",
            style=wide,
            value=len(self.blocks) - 1,
            options=[(str(b + 1), i) for i, b in enumerate(self.blocks)],
        )
        expert = ipywidgets.Dropdown(
            description="expert",
            style=wide,
            value=None,
            options=[("all", None), *((str(e), e) for e in range(self.experts))],
        )

        def redraw(_change: Any) -> None:
            picture.value = self.view(image.value, layer.value, expert.value)

        for control in (image, layer, expert):
            control.observe(redraw, names="value")
        return ipywidgets.VBox([image, layer, expert, picture])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/html": self.static.html, "text/plain": self.static.alt}
        if self.widget is not None:
            made = self.widget._repr_mimebundle_(**kwargs)
            made = made[0] if isinstance(made, tuple) else made
            bundle = {**(made or {}), **bundle}
        return bundle


def explorer(
    images: np.ndarray,
    token_expert: np.ndarray,
    blocks: Sequence[int],
    experts: int,
    *,
    caption: str,
    alt: str,
    names: Sequence[str] | None = None,
    prefix: int = 1,
    grid: tuple[int, int] | None = None,
    shown: int = 4,
) -> Explorer:
    """Explorer of probe images, to be the value of a cell.

    images: (P, ...); token_expert: (M, P, N) of a record; blocks: (M,) 0-based; names: (P,), such
    as the true classes. caption, alt: of the static figure, which shows the first `shown` images at
    up to four layers.
    """
    token_expert = np.asarray(token_expert)
    names = (
        [f"image {i}" for i in range(len(images))]
        if names is None
        else [f"{i}: {n}" for i, n in enumerate(names)]
    )
    shown = min(shown, len(images))
    fig = token_maps(
        images[:shown],
        token_expert[:, :shown],
        blocks,
        experts,
        names=names[:shown],
        prefix=prefix,
        grid=grid,
    )
    static = show(fig, caption, alt)
    return Explorer(images, token_expert, blocks, experts, names, prefix, grid, static)


def of_record(record: Any, shown: int = 4) -> Explorer:
    """Explorer of a record's probe images. Where the data set is not at hand the maps stand alone,
    on grey.

    Raises ValueError if the record has no MoE layer.
    """
    if not record.moe:
        raise ValueError(f"record {record.id} has no MoE layer: give a record whose spec has moe")
    maps, index = record.arrays["token_expert"], record.arrays["probe_index"]
    caption = (
        f"Probe images of the test split and the expert that each patch goes to first, for layers from shallow to deep; "
        f"{record.spec.data.name}, run {record.id}."
    )
    names = None
    found = probe_images(record, len(index))
    if found is not None:
        images, names = (
            [image for image, _ in found],
            [record.class_names[label] for _, label in found],
        )
    else:
        images = [np.full((8, 8), 200, np.uint8)] * len(index)
        caption += " The images are not on the machine that built this page (MOE_DATA)."
    size = min({image.shape for image in images})
    uniform = (
        np.stack(images)
        if len({image.shape for image in images}) == 1
        else np.stack([image[..., : size[-2], : size[-1]] for image in images])
    )
    return explorer(
        uniform,
        maps,
        [m["block"] for m in record.moe],
        len(record.moe[-1]["load"]),
        names=names,
        shown=shown,
        caption=caption,
        alt="A row an image: the image, then the same image tiled with expert numbers, one tile a "
        "patch, one column a layer.",
    )
