"""Gives a split as batches of images and labels, again and again, as a loader does.

Axis letters: **B** images, **C** channels, **S** side in pixels that the model sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..spec import RunSpec
from .augment import pass_over
from .splits import Split, Wanted, scale_of


class Batches:
    """Iterates over pairs of images (B, C, S, S) and labels (B,) of a split, on the run's device.

    run: says how pixels are normalised, how they are augmented, and the seed. size: largest B.
    shuffled: each pass has an order of its own and is augmented; two objects of one seed give the
    same passes.
    """

    def __init__(self, split: Split, run: RunSpec, size: int = 64, shuffled: bool = False):
        self.split, self.run, self.size, self.shuffled = split, run, size, shuffled
        self._generator = torch.Generator().manual_seed(run.seed)

    def __len__(self) -> int:
        return -(-len(self.split) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        index, ahead = torch.arange(len(self.split)), None
        if self.shuffled:
            index = torch.randperm(len(self.split), generator=self._generator)
            # it draws for batches that are made ahead, of which a pass may not see all
            ahead = torch.Generator()
            ahead.set_state(self._generator.get_state())
        wanted = (Wanted(part, ahead) for part in index.split(self.size))
        for part, images in self.split.batches(wanted, self.run):
            if self.shuffled:
                pass_over(self.run.data.augment, len(part), self._generator)
            yield images, self.split.labels[part].to(self.run.device)


def preprocessing(run: RunSpec, channels: int) -> dict[str, Any]:
    """Says what is done to the images of a run: mean and deviation of pixels in 0..1, and side."""
    mean, std = scale_of(channels, run.backbone)
    return {
        # as they were written before they were float32
        "mean": [round(value, 6) for value in mean.flatten().tolist()],
        "std": [round(value, 6) for value in std.flatten().tolist()],
        "size": run.data.image_size,
    }
