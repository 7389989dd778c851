"""Describes the images of a run, and deals its classes to experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import ClassNumber, ColumnName, FileName, Positive, Seed, Size, Spec

PACKAGED = "mnist5k"  # 5,000 real MNIST images that come with a package
# data sets by the names that readers know; others are called as their folder is
TITLES = {
    "cifar100": "CIFAR-100",
    "eurosat": "EuroSAT",
    "imagenet": "ImageNet",
    "mit-indoor": "MIT Indoor",
    "solar_pv": "solar panels",
    PACKAGED: "MNIST (5,000 images)",
}


class DataSpec(Spec):
    """Describes the images of a run, and how many of them there are.

    Subsets are class-balanced and depend on `subset_seed` alone.
    """

    # mnist5k | a folder under MOE_DATA (parquet, class folders, GEO-Bench, MIT Indoor, CIFAR's
    # binary version) | hub:owner/name
    name: FileName = PACKAGED
    image_size: Size = 28  # side in pixels that the model sees
    # training images; None = all that are left after the validation split
    train: Positive | None = None
    val: Positive | None = None  # validation images; None = the whole validation split
    test: Positive | None = None  # test images; None = all
    label: ColumnName = "label"  # label column; CIFAR-100 has fine_label and coarse_label
    # training images only; auto: flip_crop and the CIFAR-10 policy of AutoAugment (1805.09501)
    augment: Literal["none", "flip", "shift", "flip_crop", "resized_crop", "auto"] = "none"
    subset_seed: Seed = 0  # chooses the subset; not the training seed
    # first class and one past the last of those that stay, numbered anew from 0; None = all
    classes: tuple[ClassNumber, Annotated[ClassNumber, Field(ge=1)]] | None = None

    # GEO-Bench: three bands by name, in the place of red, green and blue; None = these
    bands: Annotated[tuple[ColumnName, ColumnName, ColumnName], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _bands_fit(self):
        if self.bands is None:
            return self
        names = [name.lower() for name in self.bands]
        if names == ["red", "green", "blue"] or len(set(names)) < len(names):
            raise ValueError(
                f"bands={self.bands}: name three different ones, and leave it at None for red, "
                "green, blue, so that equal runs have equal ids"
            )
        if list(self.bands) != names:
            raise ValueError(
                f"bands={self.bands}: write names in small letters, so that equal runs have equal "
                "ids"
            )
        if not self.in_folder:
            raise ValueError(
                f"bands={self.bands} are those of a GEO-Bench folder, and {self.name} is none: "
                "leave it at None"
            )
        return self

    @model_validator(mode="after")
    def _no_idle_fields(self):
        if self.name == PACKAGED and self.label != "label":
            raise ValueError(
                f"label={self.label!r} names a column, and {PACKAGED} has none: leave it at 'label'"
            )
        if self.subset_seed and self.train is self.val is self.test is None:
            raise ValueError(
                f"subset_seed={self.subset_seed} would choose nothing, as all images are taken: "
                "give train, val or test, or leave it at 0"
            )
        if self.classes is not None and self.classes[0] >= self.classes[1]:
            raise ValueError(
                f"classes={self.classes}: give the first class and one past the last, with "
                "0 <= first < end"
            )
        return self

    @property
    def title(self) -> str:
        """Returns the name by which readers know the data."""
        return TITLES.get(self.name, self.name)

    @property
    def training_images(self) -> str:
        """Says how many training images are asked for: "10,000 training images", or all."""
        return f"{'all' if self.train is None else f'{self.train:,}'} training images"

    @property
    def in_folder(self) -> bool:
        """Says whether the images are looked for in a folder under MOE_DATA."""
        return self.name != PACKAGED and not self.name.startswith("hub:")


def class_groups(classes: int, experts: int) -> tuple[tuple[int, ...], ...]:
    """Deals the classes to the experts in index order: 67 to 4 are 17, 17, 17 and 16.

    Fewer classes than experts go round. Raises ValueError for less than one of either.
    """
    if classes < 1 or experts < 1:
        raise ValueError(f"classes={classes} over experts={experts}: both must be at least 1")
    if classes < experts:
        return tuple((e % classes,) for e in range(experts))
    size, rest = divmod(classes, experts)
    starts = [e * size + min(e, rest) for e in range(experts + 1)]
    return tuple(tuple(range(*ends)) for ends in zip(starts, starts[1:], strict=False))
