"""Says which images each step of a stage takes, and what draws: functions of seed and step alone.

Axis letters: **B** images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..inputs.splits import Wanted
from ..spec import RunSpec, TrainSpec

# what a random draw is for: each use has numbers of its own
ORDER, AUGMENTATION, NOISE = 1, 2, 3


def steps_in_epoch(train: TrainSpec, images: int) -> int:
    """Counts the batches of an epoch, of which the last may be smaller."""
    return -(-images // train.batch)


def steps_in_all(train: TrainSpec, steps_per_epoch: int) -> int:
    """Counts the steps of a stage: epochs may be fractions, and one step is taken at least."""
    return max(1, round(train.epochs * steps_per_epoch))


def batches_from(start: int, images: int, spec: RunSpec) -> Iterator[Wanted]:
    """Yields the images (B,) of each step from `start` on, with the generator that augments.

    Each epoch takes all images once, in an order of its own.
    """
    seed, batch, order = spec.seed, spec.train.batch, None
    per_epoch = steps_in_epoch(spec.train, images)
    for step in range(start, steps_in_all(spec.train, per_epoch)):
        epoch, at = divmod(step, per_epoch)
        if order is None or at == 0:
            order = torch.randperm(images, generator=_generator(seed, ORDER, epoch))
        augmentation = _generator(seed, AUGMENTATION, step)
        yield Wanted(order[at * batch : (at + 1) * batch], augmentation)


def mix(*parts: int) -> int:
    """Makes one seed of several numbers, without the collisions that a sum would have."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed


def _generator(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*parts))
