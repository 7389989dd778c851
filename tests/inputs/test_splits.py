"""Data sets: splits, subsets, the ways to a data set, damage, augmentation and resizing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import encoded, parquet

from lib import paths
from lib.inputs import augment, sources, splits
from lib.inputs.splits import load_splits
from lib.spec import DataSpec

GIVEN = os.environ.get("MOE_DATA")  # before a test sets its own


def counts(split: splits.Split) -> list[int]:
    return torch.bincount(split.labels).tolist()


# ---------------------------------------------------------------- splits and subsets


def test_mnist_splits_are_fixed_balanced_and_disjoint():
    splits = load_splits(DataSpec())
    assert (len(splits.train), len(splits.val), len(splits.test)) == (4000, 500, 500)
    assert (counts(splits.train), counts(splits.val), counts(splits.test)) == (
        [400] * 10,
        [50] * 10,
        [50] * 10,
    )
    rows = [set(split.rows.tolist()) for split in (splits.train, splits.val, splits.test)]
    assert set.union(*rows) == set(range(5000)) and sum(map(len, rows)) == 5000
    assert splits.class_names == list("0123456789") and splits.channels == 1
    # Pinned: another cut would turn test images of committed records into training images.
    assert (
        splits.test.rows[:5].tolist()
        == load_splits(DataSpec(train=100, subset_seed=9)).test.rows[:5].tolist()
        == [1, 35, 39, 62, 64]
    )
    labels = splits.train.source.labels
    assert np.array_equal(labels[splits.train.rows], splits.train.labels.numpy())


def test_subset_depends_on_its_own_seed_and_size_alone():
    one = load_splits(DataSpec(train=100, val=30, test=20))
    other = load_splits(DataSpec(train=100, val=500, augment="shift", image_size=14))
    # Sizes of other splits and what is done to images do not matter.
    assert np.array_equal(one.train.rows, other.train.rows)
    assert (
        counts(one.train) == [10] * 10
        and counts(one.val) == [3] * 10
        and counts(one.test) == [2] * 10
    )
    assert not np.array_equal(
        one.train.rows, load_splits(DataSpec(train=100, subset_seed=1)).train.rows
    )
    # A larger subset contains the smaller one, so a learning curve adds images and exchanges none.
    assert set(one.train.rows) < set(load_splits(DataSpec(train=205)).train.rows)
    assert sorted(counts(load_splits(DataSpec(train=205)).train)) == [20] * 5 + [21] * 5


def test_lent_rows_are_in_proportion_and_leave_every_class_some():
    labels = np.repeat(np.arange(6), [1, 2, 3, 10, 40, 144])  # 200 images, long-tailed
    lent = splits._proportional(labels, np.arange(200), 20, seed=0)
    # 20 of 200: a tenth of each class, to the nearest image
    assert np.bincount(labels[lent], minlength=6).tolist() == [0, 0, 0, 1, 4, 15]
    half = splits._proportional(labels, np.arange(200), 100, seed=1)
    assert (np.bincount(labels[half], minlength=6) < [1, 2, 3, 10, 40, 144]).all()
    equal = np.repeat(np.arange(7), 30)
    rows = np.arange(210)[3:]  # classes of one size but for one
    assert np.array_equal(
        splits._proportional(equal, np.arange(210), 70, seed=4),
        splits._balanced(equal, np.arange(210), 70, seed=4, request=""),
    )
    assert len(splits._proportional(equal, rows, 20, seed=4)) == 20


@pytest.mark.parametrize(
    "sizes, kept",
    [
        ([1] * 18 + [2, 2], 20),  # a tenth are 2, and 2 can be spared: one for each split
        ([1] * 19 + [2], None),  # 1 can be spared, and two splits need one
        ([1] * 20, None),
        ([9] + [1] * 11, 9 + 11 - 2 * 2),
    ],
)
def test_every_class_keeps_an_image_where_most_have_one(sizes, kept):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    opened = {"train": sources.Source(labels, None, 3)}
    if kept is None:
        with pytest.raises(
            ValueError, match="has no test split, and only [01] training images more than"
        ):
            splits._rows_of_splits("tail", opened)
        return
    rows = {split: rows for split, (_, rows) in splits._rows_of_splits("tail", opened).items()}
    assert np.array_equal(np.unique(labels[rows["train"]]), np.arange(len(sizes)))
    assert len(rows["train"]) == kept
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(len(labels)))


def test_rows_are_lent_as_ever_where_each_class_can_spare_them():
    draw = np.random.default_rng(0)
    for seed in range(50):
        labels = np.repeat(np.arange(12), draw.integers(2, 90, 12))
        rows, count = np.arange(len(labels)), len(labels) // 10
        shuffled, rank = splits._shuffled(labels, rows, seed)
        place = (rank + 0.5) / np.bincount(labels)[labels[shuffled]]
        by_share_alone = np.sort(shuffled[np.argsort(place, kind="stable")[:count]])
        assert np.array_equal(splits._proportional(labels, rows, count, seed), by_share_alone)


def test_splits_without_images_are_refused_by_name(home):
    few = [encoded(value) for value in range(8)]
    parquet(home / "few" / "train.parquet", few, [0, 1] * 4, ["a", "b"])
    with pytest.raises(ValueError, match="few has no test split, and a tenth of its 8 training"):
        load_splits(DataSpec(name="few"))
    parquet(home / "few" / "test.parquet", [], [], ["a", "b"])
    sources.forget()
    with pytest.raises(ValueError, match="few, split test: there is no image in it"):
        load_splits(DataSpec(name="few"))
    images = [encoded(value) for value in range(30)]
    parquet(home / "rare" / "train.parquet", images, [0] * 29 + [1], ["a", "b"])
    rare = load_splits(DataSpec(name="rare", image_size=8))
    assert [counts(split) for split in (rare.train, rare.val, rare.test)] == [[23, 1], [3], [3]]
    with pytest.raises(ValueError, match="rare, split test: no image of the classes asked for"):
        load_splits(DataSpec(name="rare", classes=(1, 2)))


def test_all_classes_are_no_choice_of_classes():
    with pytest.raises(ValueError, match=r"classes=\(0, 10\) of data set mnist5k are all that it"):
        load_splits(DataSpec(classes=(0, 10)))
    with pytest.raises(ValueError, match="with 0 <= first < end <= 10"):
        load_splits(DataSpec(classes=(5, 11)))
    assert load_splits(DataSpec(classes=(1, 10))).class_names == list("123456789")


def test_balanced_rule_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    picked = splits._balanced(labels, np.arange(7), 5, seed=0, request="")
    # Rank 0 of each class first (3 images), then rank 1 of the two classes that have one.
    assert np.bincount(labels[picked]).tolist() == [2, 2, 1] and picked.tolist() == sorted(picked)


@pytest.mark.parametrize("split, there", [("train", 4000), ("val", 500), ("test", 500)])
def test_more_images_than_there_are(split, there):
    with pytest.raises(
        ValueError, match=f"mnist5k, {split}=4001: 4001 images asked for, only {there} are there"
    ):
        load_splits(DataSpec(**{split: 4001}))


# ---------------------------------------------------------------- the ways to a data set


def test_moe_data_that_is_no_folder(home, monkeypatch):
    monkeypatch.setenv("MOE_DATA", str(home / "typo"))
    with pytest.raises(
        FileNotFoundError,
        match=r"MOE_DATA='.*typo' is not a folder \(looked at [^ ]*typo\): .*unset it",
    ):
        load_splits(DataSpec(name="toy"))


def test_relative_moe_data_is_made_absolute(home, monkeypatch):
    monkeypatch.chdir(home.parent)
    monkeypatch.setenv("MOE_DATA", "home")
    assert paths.data_home() == home.resolve()


def test_missing_data_set_teaches(home, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        load_splits(DataSpec(name="cifar100"))
    text = str(caught.value)
    assert (
        str(home / "cifar100") in text
        and "Either set MOE_DATA" in text
        and "hub:owner/cifar100" in text
    )
    monkeypatch.delenv("MOE_DATA")
    with pytest.raises(FileNotFoundError, match="MOE_DATA is not set"):
        load_splits(DataSpec(name="cifar100"))


# ---------------------------------------------------------------- damage


# ---------------------------------------------------------------- the real sets, where they are

PINNED = {  # SHA-256 of rows and labels of the whole splits: records of them are committed
    "mnist5k": ("label", ["e1730889db07", "cc519322a47a", "7863d6862516"]),
    "cifar100": ("fine_label", ["cf70b0c51acb", "13c35e634360", "a3114086e01f"]),
    "eurosat": ("label", ["1dd1e7fac061", "52940e334c12", "47719427a844"]),
    "solar_pv": ("label", ["2193f6eba948", "774973354d01", "9a068221a078"]),
}
REAL = {  # name: (label column, (train, val, test), some class names in place)
    "cifar100": (
        "fine_label",
        (45_000, 5_000, 10_000),
        {0: "apple", 1: "aquarium_fish", 50: "mouse", 99: "worm"},
    ),
    "eurosat": ("label", (6_000, 1_500, 2_500), {}),
    "solar_pv": ("label", (897, 299, 300), {0: "no_pv", 1: "pv"}),
}


def given(name: str) -> None:
    if name != "mnist5k" and not (GIVEN and (Path(GIVEN) / name).is_dir()):
        pytest.skip(f"MOE_DATA has no {name}")
    sources.forget()


def digest(split: splits.Split) -> str:
    content = split.rows.astype("int64").tobytes() + split.labels.numpy().astype("int64").tobytes()
    return hashlib.sha256(content).hexdigest()[:12]


@pytest.mark.parametrize("name", PINNED)
def test_rows_of_committed_records_are_pinned(name):
    given(name)
    label, digests = PINNED[name]
    loaded = load_splits(DataSpec(name=name, label=label))
    assert list(map(digest, (loaded.train, loaded.val, loaded.test))) == digests


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name):
    given(name)
    label, sizes, names = REAL[name]
    loaded = load_splits(DataSpec(name=name, label=label, image_size=32, train=100))
    opened, _ = sources.sources_of(name, label, paths.data_home())
    pools = splits._rows_of_splits(name, opened)
    assert tuple(len(pools[split][1]) for split in ("train", "val", "test")) == sizes
    assert {number: loaded.class_names[number] for number in names} == names
    if name == "cifar100":
        assert loaded.class_names == sorted(loaded.class_names) and len(loaded.class_names) == 100
        assert counts(loaded.val) == [50] * 100 and counts(loaded.train) == [1] * 100
        assert not set(pools["train"][1]) & set(pools["val"][1])
    images = loaded.train.batch(torch.arange(4), DataSpec(image_size=32))
    assert images.shape == (4, 3, 32, 32) and images.std() > 0.1


# ---------------------------------------------------------------- augmentation and resizing


def split_of(images: list[torch.Tensor]) -> splits.Split:
    source = sources.Source(np.zeros(len(images)), images.__getitem__, images[0].shape[0])
    return splits.Split(source, np.arange(len(images)), torch.zeros(len(images), dtype=torch.long))


def test_shift_by_hand():
    image = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    moved = [
        augment.random_shift(image, 1, torch.Generator().manual_seed(seed)) for seed in range(200)
    ]
    seen = {tuple(each.flatten().int().tolist()) for each in moved}
    assert len(seen) == 9  # each of the 3 x 3 offsets occurs
    assert (1, 2, 3, 4, 5, 6, 7, 8, 9) in seen  # not moved
    assert (0, 0, 0, 0, 1, 2, 0, 4, 5) in seen  # one down, one right; black comes in
    assert (5, 6, 0, 8, 9, 0, 0, 0, 0) in seen  # one up, one left


def test_each_image_of_a_batch_has_its_own_shift_and_keeps_its_channels():
    # 2 channels: the second is twice the first.
    image = torch.stack([torch.eye(4), 2 * torch.eye(4)])
    out = augment.random_shift(image.expand(64, 2, 4, 4), 1, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, 1], 2 * out[:, 0])
    assert len({tuple(each.flatten().tolist()) for each in out}) > 3


def test_flip_by_hand():
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).expand(64, 1, 2, 2)
    out = augment.random_flip(image, torch.Generator().manual_seed(0))
    mirrored = (out == torch.tensor([[2.0, 1.0], [4.0, 3.0]])).flatten(1).all(1)
    kept = (out == image).flatten(1).all(1)
    assert bool((mirrored ^ kept).all()) and 16 < int(mirrored.sum()) < 48


def test_resized_crop_is_a_part_of_the_image():
    # Grey rises from left to right and channel 1 from top to bottom, so a box shows its place and
    # its extent.
    ramp = (torch.arange(64) * 4).to(torch.uint8)
    image = torch.stack(
        [ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64, dtype=torch.uint8)]
    )
    areas, aspects = [], []
    for seed in range(60):
        out = augment.random_resized_crop(image, 16, torch.Generator().manual_seed(seed))
        assert out.shape == (3, 16, 16) and 0 <= out.min() and out.max() <= 1
        # Of 252/255; the resize eats a sixteenth.
        wide, high = out[0, 0, -1] - out[0, 0, 0], out[1, -1, 0] - out[1, 0, 0]
        areas.append(float(wide * high) * (16 / 15) ** 2)
        aspects.append(float(wide / high))
    assert 0.15 < min(areas) < 0.4 and 0.75 < max(areas) <= 1.1
    assert 0.6 < min(aspects) < 0.95 and 1.05 < max(aspects) < 1.6


@pytest.mark.parametrize("augment", ["flip", "shift", "flip_crop", "resized_crop", "auto"])
def test_augmentation_follows_its_generator_and_spares_evaluation(augment):
    images = list(
        torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(
            torch.uint8
        )
    )
    split, spec, plain = (
        split_of(images),
        DataSpec(image_size=16, augment=augment),
        DataSpec(image_size=16),
    )
    index, state = torch.arange(8), torch.get_rng_state()
    first = split.batch(index, spec, torch.Generator().manual_seed(5))
    assert torch.equal(first, split.batch(index, spec, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, split.batch(index, spec, torch.Generator().manual_seed(6)))
    # no generator: evaluation
    assert torch.equal(split.batch(index, spec), split.batch(index, plain))
    assert not torch.equal(first, split.batch(index, plain))
    assert torch.equal(torch.get_rng_state(), state)
    # pixels stay as they were
    assert all(torch.equal(kept, split.source.image(n)) for n, kept in enumerate(images))


@pytest.mark.parametrize("augment", ["shift", "flip_crop"])
def test_images_of_many_sizes_are_augmented_too(augment):
    split = split_of(
        [
            torch.randint(0, 256, (3, 16 + n, 20), generator=torch.Generator().manual_seed(n)).to(
                torch.uint8
            )
            for n in range(8)
        ]
    )
    spec = DataSpec(image_size=14, augment=augment)
    assert not torch.equal(
        split.batch(torch.arange(8), spec, torch.Generator().manual_seed(1)),
        split.batch(torch.arange(8), spec),
    )


def test_normalisation_by_hand():
    grey = split_of([torch.full((1, 4, 4), 255, dtype=torch.uint8)])
    # (1 - 0.5) / 0.5
    assert torch.allclose(
        grey.batch(torch.tensor([0]), DataSpec(image_size=4)), torch.ones(1, 1, 4, 4)
    )
    colour = split_of([torch.zeros(3, 4, 4, dtype=torch.uint8)])
    out = colour.batch(torch.tensor([0]), DataSpec(image_size=4))[0, :, 0, 0]
    assert torch.allclose(out, torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


def test_bicubic_resize_shape_and_range():
    # A hard edge: bicubic overshoots on both sides of it, and the result must still be an image.
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1
    for side in (4, 21):
        out = augment.resize(edge, side)
        assert out.shape == (1, 1, side, side) and out.min() == 0 and out.max() == 1
    assert augment.resize(edge, 8) is edge
    flat = augment.resize(torch.full((1, 3, 5, 5), 0.25), 14)
    assert torch.allclose(flat, torch.full((1, 3, 14, 14), 0.25))


def test_what_becomes_of_an_image_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        for shape in ((3, 16, 16), (3, 16, 24), (3, 30, 20), (3, 16, 16))
    ]
    split, spec = split_of(images), DataSpec(image_size=14)
    together = split.batch(torch.arange(4), spec)
    for number in range(4):
        assert torch.allclose(
            together[number], split.batch(torch.tensor([number]), spec)[0], atol=1e-6
        )


def test_centre_of_an_oblong_image():
    # 8 x 32 with a white middle: the shorter side goes to 16 (= 14 * 8/7), the longer to 64, and
    # the middle 14 are cut out.
    image = torch.zeros(3, 8, 32, dtype=torch.uint8)
    image[:, :, 11:21] = 255
    out = augment.resize_and_crop_centre(image, 14)
    assert out.shape == (3, 14, 14) and torch.allclose(out, torch.ones_like(out), atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 1, 2000), (3, 900, 2)])
def test_of_a_very_long_image_the_middle_is_resized(shape, monkeypatch):
    sizes, bicubic = [], augment._bicubic

    def watched(pixels, size):
        sizes.append(size)
        return bicubic(pixels, size)

    monkeypatch.setattr(augment, "_bicubic", watched)
    image = torch.zeros(shape, dtype=torch.uint8)
    short, long = sorted(shape[1:])
    axis = shape.index(long)
    image.narrow(axis, (long - 16 * short) // 2, 16 * short).fill_(255)
    out = augment.resize_and_crop_centre(image, 56)
    assert out.shape == (3, 56, 56) and torch.allclose(out, torch.ones_like(out), atol=1e-3)
    assert sorted(sizes[0]) == [64, 1024]


def test_a_long_image_is_resized_as_a_whole(monkeypatch):
    image = torch.randint(0, 256, (3, 5, 80), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    longest = augment.resize_and_crop_centre(image, 14)
    monkeypatch.setattr(augment, "LONGEST", 10**9)
    assert torch.equal(augment.resize_and_crop_centre(image, 14), longest)


def test_decoded_images_are_kept_up_to_a_limit(monkeypatch):
    calls = []
    source = sources.Source(
        np.zeros(3), lambda row: calls.append(row) or torch.zeros(1, 4, 4, dtype=torch.uint8), 1
    )
    monkeypatch.setattr(sources, "CACHED_BYTES", 32)  # two images of 16 bytes
    for row in (0, 1, 2, 0, 1, 2):
        source.image(row)
    assert calls == [0, 1, 2, 2]
