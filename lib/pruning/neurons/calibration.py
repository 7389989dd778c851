"""Which training images scores are taken from.

Axis letters: **B** images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


def calibration(
    labels: Tensor,
    class_groups: Sequence[Sequence[int]],
    images: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Draws at most `images` images for each class group, equally many of each class up to one.

    labels: (B,). Returns indices into them, one tensor a class group. Class groups that share a
    class get different images of it. Warns of classes without an image in a class group that has
    others; raises ValueError if a class group has no image at all.
    """
    order, drawn = torch.randperm(len(labels), generator=generator), []
    for g, classes in enumerate(class_groups):
        images_of_classes = []
        for c in classes:
            # The images of a class are dealt in turn to the class groups that share it.
            sharing = [i for i, other in enumerate(class_groups) if c in other]
            images_of_classes.append(order[labels[order] == c][sharing.index(g) :: len(sharing)])
        left = sum(map(len, images_of_classes))
        if images < 1 or not left:
            raise ValueError(
                f"calibration group {g} is empty: images={images}, and {left} of the "
                f"{len(labels)} images are left for its classes {tuple(classes)}"
            )
        absent = [c for c, rows in zip(classes, images_of_classes, strict=True) if not len(rows)]
        if absent:
            warnings.warn(
                f"calibration group {g} has no image of class {', '.join(map(str, absent))}: its "
                "score rests on its other classes",
                stacklevel=2,
            )
        # The first image of each class, then the second of each, and so on.
        rank = torch.cat([torch.arange(len(rows)) for rows in images_of_classes])
        drawn.append(torch.cat(images_of_classes)[rank.argsort(stable=True)[:images]])
    return drawn
