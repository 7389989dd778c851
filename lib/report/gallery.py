"""Draws test images by the expert that gets most of their tokens.

After Durham, Figure 13. Axis letters: **C** classes, **E** experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..verdicts import count
from ..verdicts.routes import images_by_expert, main_expert
from .maps import class_names
from .overlays import as_picture, bare
from .probes import test_images
from .style import WIDTH, figure, note, number, style

__all__ = ["images_of_experts", "what_experts_get"]

SHOWN = 12  # images an expert


def images_of_experts(record: Any) -> Figure:
    """Draws a dozen test images of each expert of the last MoE layer, a row an expert.

    They are evenly spread over all images of which the expert gets most tokens, in the order of the
    test split. Raises as `routes.main_expert` and `probes.test_images`.
    """
    expert_of_image = main_expert(record)
    experts = len(record.moe[-1]["load"])
    side = (WIDTH - 0.9) / SHOWN
    with style():
        fig, axes = figure(experts, SHOWN, height=0.2 + experts * (side + 0.06))
        for expert, row in enumerate(axes):
            places = np.flatnonzero(expert_of_image == expert)
            chosen = np.unique(np.linspace(0, len(places) - 1, SHOWN).round().astype(int))
            images = test_images(record, places[chosen]) if len(places) else []
            for ax in row:
                bare(ax)
            for ax, image in zip(row, images, strict=False):  # fewer than a dozen leave gaps
                ax.imshow(as_picture(image))
            if not images:
                note(row[0], "no image")
            row[0].set_ylabel(f"expert {number(expert)}", rotation=0, ha="right", va="center")
    return fig


def what_experts_get(record: Any) -> str:
    """Says for a caption how many images each expert gets, and which class is the most common."""
    names = class_names(record, len(record.arrays["class_expert"][-1]))
    parts = []
    for expert, count_of_class in enumerate(images_by_expert(record).T):
        images, most = count_of_class.sum(), count_of_class.argmax()
        parts.append(f"expert {number(expert)}: {count(images, 'image')}")
        if images:
            parts[-1] += f", {100 * count_of_class[most] / images:.0f}% of class {names[most]}"
    return "; ".join(parts)
