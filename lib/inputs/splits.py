"""Cuts a data set into fixed splits, takes subsets of them, and makes batches.

Splits are fixed: a data set without a validation split lends a tenth of its training images
(CIFAR-100: 5,000), in proportion to the classes and drawn once with a constant seed; one without a
test split (MNIST-5k) lends two tenths, one for each. Every class keeps training images. Subsets are
class-balanced and depend on `subset_seed` alone.

Axis letters: **B** images, **C** channels, **S** side in pixels that the model sees, **n** images
of a split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import paths
from ..spec import BackboneSpec, DataSpec, RunSpec
from . import loading, weights
from .augment import augmented, normalised, pass_over, places_read
from .sources import Source, sources_of

# of the fixed validation and test splits; changing it would leak test images into training
SPLIT_SEED = 20240607
# by number of channels, where the weights do not say (`weights.pixel_scale`); those of colour are
# ImageNet's, with which DINOv2, DeiT and masked autoencoders were trained
MEAN = {1: (0.5,), 3: (0.485, 0.456, 0.406)}
STD = {1: (0.5,), 3: (0.229, 0.224, 0.225)}
SIZED_ROWS = 16  # images by whose size it is told whether all of a split can be kept decoded


class Wanted(NamedTuple):
    """Names the images of a batch, (B,), and what draws their augmentation, None for none.

    share: of the batch, that is made. Draws are those of the whole batch.
    """

    index: Tensor
    generator: torch.Generator | None = None
    share: slice = slice(None)


@dataclass
class Split:
    """Names some rows of one source and makes batches of them.

    rows: (n,) row of each image in the source; labels: (n,) its class; stored: the name of the
    source among the stored splits, since training may lend the rows of others.
    """

    source: Source
    rows: np.ndarray
    labels: Tensor
    stored: str = "train"

    def __len__(self) -> int:
        return len(self.rows)

    def batch(
        self,
        index: Tensor,
        spec: RunSpec | DataSpec,
        generator: torch.Generator | None = None,
        share: slice = slice(None),
    ) -> Tensor:
        """Gives the images at `index` (B,) as normalised floats (B, C, S, S), S = image_size.

        spec: a run, whose weights say how pixels are normalised, or data alone. They are augmented
        as the spec says if a generator is given, and not without. share: of the batch, that is
        given; as far as the augmentation allows nothing else is read.
        """
        data, backbone = (spec.data, spec.backbone) if isinstance(spec, RunSpec) else (spec, None)
        kind = data.augment if generator is not None else "none"
        places = places_read(kind, len(index), share)
        images = [torch.zeros(self.source.channels, 1, 1, dtype=torch.uint8)] * len(index)
        for place in places:
            images[place] = self.source.image(int(self.rows[index[place]]))
        pixels = augmented(images, kind, data.image_size, generator)[share]
        mean, std = scale_of(pixels.shape[1], backbone)
        return normalised(pixels, mean, std)

    def batches(self, wanted: Iterable[Wanted], run: RunSpec) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields for each of `wanted` the share of its index (B,) and of its `batch`, which lies on
        the run's device.

        Processes make batches ahead where the images of the split do not all stay decoded in
        memory, or where MOE_LOADERS asks for some (`loading.processes`). Batches are the same.
        """
        wanted = iter(wanted)
        first = next(wanted, None)
        if first is None:
            return
        wanted, count = chain([first], wanted), loading.processes(run)
        if count and loading.asked_for() is None and not self._needs_reading(first.index):
            count = 0
        if not count:
            for index, generator, share in wanted:
                yield index[share], self.batch(index, run, generator, share).to(run.device)
            return
        pinned = torch.device(run.device).type == "cuda"
        under_way: deque[Tensor] = deque()
        requests = self._requests(wanted, run, under_way)
        for images in loading.in_processes(requests, count, pinned):
            yield under_way.popleft(), images.to(run.device, non_blocking=pinned)

    def _needs_reading(self, index: Tensor) -> bool:
        """Tells whether images must be read again and again, and can be by other processes.

        index: of the first batch, whose images are needed in any case.
        """
        rows = self.rows[index[:SIZED_ROWS].numpy()]
        return self.source.in_files and not self.source.stay_decoded(rows, len(self))

    def _requests(
        self, wanted: Iterable[Wanted], run: RunSpec, under_way: deque[Tensor]
    ) -> Iterator[loading.Request]:
        """Yields the requests to other processes; what each asks for is added to `under_way`."""
        data, scale = run.data, scale_of(self.source.channels, run.backbone)
        for index, generator, share in wanted:
            kind, state = "none", None
            if generator is not None:
                kind, state = data.augment, generator.get_state()
                pass_over(kind, len(index), generator)
            under_way.append(index[share])
            jobs: list[Callable[[], Tensor] | None] = [None] * len(index)
            for place in places_read(kind, len(index), share):
                jobs[place] = self.source.job(int(self.rows[index[place]]))
            yield loading.Request(jobs, kind, data.image_size, state, *scale, share)


def scale_of(channels: int, backbone: BackboneSpec | None) -> tuple[Tensor, Tensor]:
    """Gives the mean and deviation, (1, C, 1, 1) each, by which pixels in 0..1 are normalised.

    They are those that the weights of the backbone were trained with, where these say so and are
    for as many channels. None: of data that no backbone sees.
    """
    scale = None if backbone is None else weights.pixel_scale(backbone.weights, backbone.name)
    if scale is None or len(scale[0]) != channels:
        scale = MEAN[channels], STD[channels]
    mean, std = map(torch.tensor, scale)
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


@dataclass
class Splits:
    """Holds the three splits of a DataSpec, the names of its classes and its number of channels."""

    train: Split
    val: Split
    test: Split
    class_names: list[str]
    channels: int


def load_splits(spec: DataSpec) -> Splits:
    """Finds, checks and subsets the data set. Images are decoded on first use and kept in memory.

    Raises FileNotFoundError if the data set is not there, ValueError if it has not the classes or
    the images asked for.
    """
    sources, names = sources_of(spec.name, spec.label, paths.data_home(), spec.bands)
    first, end = spec.classes or (0, len(names))
    if not first < end <= len(names):
        raise ValueError(
            f"classes={spec.classes} of data set {spec.name}: give the first class and one past "
            f"the last, with 0 <= first < end <= {len(names)}"
        )
    if spec.classes == (0, len(names)):
        raise ValueError(
            f"classes={spec.classes} of data set {spec.name} are all that it has: leave it at "
            "None, so that equal runs have equal ids"
        )
    count_of_split = {"train": spec.train, "val": spec.val, "test": spec.test}
    splits = {}
    for split, (stored, rows) in _rows_of_splits(spec.name, sources).items():
        source = sources[stored]
        rows = rows[(source.labels[rows] >= first) & (source.labels[rows] < end)]
        count = count_of_split[split]
        if not len(rows):
            raise ValueError(
                f"data set {spec.name}, split {split}: no image of the classes asked for, "
                f"classes={spec.classes}: choose classes that all splits have"
            )
        request = f"{spec.name}, {split}={count}"
        rows = _balanced(source.labels, rows, count, spec.subset_seed, request)
        # classes are numbered anew from 0
        splits[split] = Split(source, rows, torch.from_numpy(source.labels[rows] - first), stored)
    return Splits(**splits, class_names=names[first:end], channels=sources["train"].channels)


def _rows_of_splits(name: str, sources: dict[str, Source]) -> dict[str, tuple[str, np.ndarray]]:
    """Lists for each split the stored one with the rows that it may draw from there; absent splits
    are lent by training.

    Raises ValueError for a split without images, and for training images too few to lend a tenth or
    to leave each class one.
    """
    for split, source in sources.items():
        if not len(source.labels):
            raise ValueError(
                f"data set {name}, split {split}: there is no image in it: give it some, or take "
                "the split away"
            )
    train = sources["train"]
    remaining_rows, rows_of_splits = np.arange(len(train.labels)), {}
    absent = 2 - len(sources.keys() & {"test", "val"})
    for split in ("test", "val"):
        if split in sources:
            rows_of_splits[split] = (split, np.arange(len(sources[split].labels)))
            continue
        count = len(train.labels) // 10
        if not count:
            raise ValueError(
                f"data set {name} has no {split} split, and a tenth of its {len(train.labels)} "
                f"training images would be none: give it a {split} split, or 10 images and more"
            )
        # each class keeps one, and of the others there are some for each absent split
        spare = len(remaining_rows) - len(np.unique(train.labels))
        lent_rows = _proportional(
            train.labels, remaining_rows, min(count, spare // absent), SPLIT_SEED
        )
        if not len(lent_rows):
            raise ValueError(
                f"data set {name} has no {split} split, and only {spare} training images more than "
                f"classes to lend to it: give it a {split} split, or more images a class"
            )
        absent -= 1
        rows_of_splits[split] = ("train", lent_rows)
        remaining_rows = np.setdiff1d(remaining_rows, lent_rows)
    rows_of_splits["train"] = ("train", remaining_rows)
    return rows_of_splits


def _balanced(
    labels: np.ndarray, rows: np.ndarray, count: int | None, seed: int, request: str
) -> np.ndarray:
    """Draws `count` of `rows`, the same number of each class up to one, and sorts them.

    labels: of all rows of the source. count: None takes all rows. request: begins the message of
    the ValueError for more images than there are.
    """
    if count is None:
        return rows
    if count > len(rows):
        raise ValueError(
            f"{request}: {count} images asked for, only {len(rows)} are there: ask for that many "
            "at most, or give none to take all"
        )
    shuffled, rank = _shuffled(labels, rows, seed)
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:count]])


def _proportional(labels: np.ndarray, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws `count` of `rows`, of each class its share up to one image, and sorts them.

    labels: of all rows of the source. Every class keeps a row that is not drawn: where that leaves
    fewer than `count`, all the others are drawn. Of classes of one size the same rows are drawn as
    by `_balanced`.
    """
    shuffled, rank = _shuffled(labels, rows, seed)
    size = np.bincount(labels[rows])[labels[shuffled]]  # (n,) of the class of each
    # Image r of the n of a class stands at (r + 1/2) / n of it: the lowest places of all classes
    # are its share of each.
    order = np.argsort((rank + 0.5) / size, kind="stable")
    is_last = rank[order] == size[order] - 1
    return np.sort(shuffled[order[~is_last][:count]])


def _shuffled(labels: np.ndarray, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffles rows; returns them with the rank of each inside its class, in shuffled order."""
    shuffled = np.random.default_rng(seed).permutation(rows)
    order = np.argsort(labels[shuffled], kind="stable")
    sorted_labels = labels[shuffled][order]
    first_of_class = np.searchsorted(sorted_labels, sorted_labels)
    rank = np.empty(len(rows), dtype=np.int64)
    rank[order] = np.arange(len(rows)) - first_of_class
    return shuffled, rank
