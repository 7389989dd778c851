"""Lets a reader of a live notebook choose image, layer and expert, and shows the token overlay.

On a published page nothing answers to a control, so the same views stand there as a figure: the
explorer displays as widgets where a kernel serves them, and as the static figure where not. For the
second case the display bundle carries both; a book leaves the widget view out by its Sphinx setting
`nb_mime_priority_overrides: [["html", "application/vnd.jupyter.widget-view+json", null]]`.

Axis letters: **P** probe images, **M** MoE layers from the shallowest to the deepest, **N** tokens.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from ..verdicts.masks import first_choices
from .overlays import as_picture, spread, token_grid, token_maps, token_view
from .probes import absent_images, probe_images, probe_names
from .style import Shown, expert_colours, figure, number, png, show, style, text_colour

__all__ = ["Explorer", "explorer", "of_record"]

MOST_BYTES = 300_000  # of the maps that a page carries; what is beyond are images left out


class Explorer:
    """Shows one image and one layer at a time.

    widget: the controls and the picture, None without ipywidgets; static: the figure of a page.
    """

    def __init__(
        self,
        images: np.ndarray | None,
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
        """Draws one image at one layer (index into the MoE layers) as PNG.

        expert: colours its patches only; None = all.
        """
        with style():
            fig, axes = figure(height=4.0, width=4.2)
            token_view(
                axes[0, 0],
                None if self.images is None else self.images[image],
                self.token_expert[layer, image],
                self.experts,
                prefix=self.prefix,
                grid=self.grid,
                highlight=expert,
            )
            title = f"{self.names[image]}, block {number(self.blocks[layer])}"
            if expert is not None:
                patches = self.token_expert[layer, image][self.prefix :]
                patches = patches[patches >= 0]
                count = int((patches == expert).sum())
                title += f", {count} of {patches.size} patches to expert {number(expert)}"
            axes[0, 0].set_title(title)
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
            options=[(str(number(b)), i) for i, b in enumerate(self.blocks)],
        )
        expert = ipywidgets.Dropdown(
            description="expert",
            style=wide,
            value=None,
            options=[("all", None), *((str(number(e)), e) for e in range(self.experts))],
        )

        def redraw(_change: Any) -> None:
            picture.value = self.view(image.value, layer.value, expert.value)

        for control in (image, layer, expert):
            control.observe(redraw, names="value")
        return ipywidgets.VBox([image, layer, expert, picture])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/html": self.static.html, "text/plain": self.static.alt}
        if self.widget is not None:
            of_widget = self.widget._repr_mimebundle_(**kwargs)
            if isinstance(of_widget, tuple):  # with metadata
                of_widget = of_widget[0]
            bundle = {**(of_widget or {}), **bundle}
        return bundle

    @property
    def on_page(self) -> Shown:
        """The static figure, and below it what `book/_static/routing.js` makes of the maps: every
        image and block, by slider, mouse and arrow keys. Without JavaScript the figure is all."""
        count = len(self.names)
        while count and len(self._content(count)) > MOST_BYTES:
            count -= 1
        box = f'<div class="routing" data-content="{html.escape(self._content(count))}"></div>'
        return Shown(self.static.html + box, self.static.alt)

    def _content(self, count: int) -> str:
        """Writes the first images and their maps as JSON."""
        rows, columns = token_grid(self.token_expert.shape[-1], self.prefix, self.grid)
        patches = self.token_expert[:, :count, self.prefix :]
        colours = expert_colours(self.experts)
        images = [None] * count if self.images is None else map(_data_uri, self.images[:count])
        content = {
            "images": list(images),
            "names": self.names[:count],
            "blocks": [number(block) for block in self.blocks],
            "grid": [rows, columns],
            "colours": [mpl.colors.to_hex(colour) for colour in colours],
            "ink": [text_colour(colour) for colour in colours],
            "experts": patches.tolist(),
        }
        return json.dumps(content)


def _data_uri(image: np.ndarray) -> str:
    """Encodes an image as PNG for a page."""
    out = io.BytesIO()
    pixels = (255 * as_picture(image)).round().astype(np.uint8)
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def explorer(
    images: np.ndarray | None,
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
    """Makes an explorer of probe images, to be the value of a cell.

    images: (P, ...), or None to draw the experts alone; token_expert: (M, P, N) of a record;
    blocks: (M,) 0-based; names: (P,), such as the true classes. caption, alt: of the static figure,
    which shows the first `shown` images at up to four layers.
    """
    token_expert = np.asarray(token_expert)
    if names is None:
        labels = names = [f"image {i}" for i in range(token_expert.shape[1])]
    else:  # a control cannot tell two images of one class apart
        labels, names = list(names), [f"{i}: {name}" for i, name in enumerate(names)]
    fig = token_maps(
        None if images is None else images[:shown],
        token_expert[:, :shown],
        blocks,
        experts,
        names=labels[:shown],
        prefix=prefix,
        grid=grid,
    )
    static = show(fig, caption, alt)
    return Explorer(images, token_expert, blocks, experts, names, prefix, grid, static)


def of_record(record: Any, shown: int = 4, lead: str = "") -> Explorer:
    """Makes an explorer of a record's probe images.

    lead: begins the caption, such as the figure of a document. Where the images are not at hand the
    maps stand alone. Raises ValueError if the record has no MoE layer.
    """
    if not record.moe:
        raise ValueError(f"record {record.id} has no MoE layer: give a record whose spec has moe")
    caption = (
        f"{lead} Test images and the expert that each patch goes to first, in blocks from shallow "
        f"to deep; {record.spec.data.title}, run {record.id}."
    ).strip()
    caption += absent_images(record)
    images = probe_images(record)
    if images is not None:  # those of several sizes are cut to one
        height = min(image.shape[-2] for image in images)
        width = min(image.shape[-1] for image in images)
        images = np.stack([image[..., :height, :width] for image in images])
    return explorer(
        images,
        record.arrays["token_expert"],
        [m["block"] for m in record.moe],
        len(record.moe[-1]["load"]),
        names=probe_names(record),
        shown=shown,
        caption=caption,
        alt=_what_maps_show(record, shown),
    )


def _what_maps_show(record: Any, shown: int) -> str:
    """Says how many experts share the patches of an image, block by block."""
    sentences = []
    for layer in spread(len(record.moe)):
        masks = first_choices(record, layer)[:shown]
        used = [len(np.unique(mask[mask >= 0])) for mask in masks]
        shared = f"{min(used)}" if min(used) == max(used) else f"{min(used)} to {max(used)}"
        block, experts = number(record.moe[layer]["block"]), len(record.moe[layer]["load"])
        sentences.append(f"Block {block}: {shared} of {experts} experts an image.")
    return " ".join([*sentences, "Images tiled with the number of each patch's expert."])
