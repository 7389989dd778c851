"""Data sets: splits, subsets, the ways to a data set, damage, augmentation and resizing."""

from __future__ import annotations

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lib import paths
from lib.inputs import augment, sources, splits
from lib.inputs.splits import load_splits
from lib.spec import DataSpec

GIVEN = os.environ.get("MOE_DATA")  # before a test sets its own
datasets.disable_progress_bars()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty MOE_DATA, with nothing remembered from another one."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("MOE_DATA", str(folder))
    monkeypatch.setenv("MOE_CACHE", str(tmp_path / "cache"))
    sources.sources_of.cache_clear()
    yield folder
    sources.sources_of.cache_clear()


def encoded(value: int, size=(8, 8), kind: str = "PNG") -> bytes:
    """A grey image as a file's bytes; size is (width, height)."""
    out = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(out, kind)
    return out.getvalue()


def parquet(file: Path, images: list[bytes], labels: list, names: list[str] | None = None) -> None:
    """A parquet file in the layout of the hub: `img` and `label`."""
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "label": label})
    rows = {"img": [{"bytes": image, "path": None} for image in images], "label": labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))


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
        == load_splits(DataSpec(subset_seed=9)).test.rows[:5].tolist()
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


def test_parquet_folder(home):
    values = list(range(40))
    kinds = ["PNG", "JPEG"]
    parquet(
        home / "toy" / "train-00000-of-00002.parquet",
        [encoded(v, kind=kinds[v % 2]) for v in values[:20]],
        [v % 2 for v in values[:20]],
        ["day", "night"],
    )
    parquet(
        home / "toy" / "train-00001-of-00002.parquet",
        [encoded(v, kind=kinds[v % 2]) for v in values[20:]],
        [v % 2 for v in values[20:]],
        ["day", "night"],
    )
    parquet(
        home / "toy" / "validation-00000-of-00001.parquet",
        [encoded(200), encoded(201)],
        [0, 1],
        ["day", "night"],
    )
    splits = load_splits(DataSpec(name="toy", image_size=8))
    # The test split is cut from training.
    assert (len(splits.train), len(splits.val), len(splits.test)) == (36, 2, 4)
    assert splits.class_names == ["day", "night"] and splits.channels == 3
    # Row r of this data set is the grey r, so an image's own pixel says where it came from.
    assert [
        int(splits.train.source.image(int(row))[0, 0, 0]) for row in splits.train.rows
    ] == splits.train.rows.tolist()
    assert splits.train.labels.tolist() == [row % 2 for row in splits.train.rows.tolist()]
    assert [int(splits.val.source.image(row)[1, 3, 3]) for row in (0, 1)] == [200, 201]
    with pytest.raises(
        ValueError, match="no label column 'fine_label'; its columns are img, label"
    ):
        load_splits(DataSpec(name="toy", label="fine_label"))


def test_plain_label_column_becomes_classes_from_zero(home):
    parquet(
        home / "plain" / "train.parquet",
        [encoded(v) for v in range(20)],
        [4 if v % 2 else 7 for v in range(20)],
    )
    splits = load_splits(DataSpec(name="plain", image_size=8))
    assert splits.class_names == ["4", "7"]
    assert splits.train.labels.tolist() == [
        0 if row % 2 else 1 for row in splits.train.rows.tolist()
    ]
    # A class that training does not know cannot be scored: refused, not counted as wrong.
    parquet(
        home / "plain2" / "train.parquet",
        [encoded(v) for v in range(20)],
        [v % 2 for v in range(20)],
    )
    parquet(home / "plain2" / "test.parquet", [encoded(9)], [2])
    with pytest.raises(ValueError, match=r"plain2, split test: column label holds \['2'\]"):
        load_splits(DataSpec(name="plain2"))


def test_image_folders(home):
    for split, count in (("train", 10), ("test", 1)):
        for klass, value in (("cat", 10), ("dog", 100)):
            folder = home / "pets" / split / klass
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:02}.png").write_bytes(encoded(value + number))
    splits = load_splits(DataSpec(name="pets", image_size=8))
    assert splits.class_names == ["cat", "dog"] and (
        len(splits.train),
        len(splits.val),
        len(splits.test),
    ) == (18, 2, 2)
    seen = sorted(
        int(splits.train.source.image(int(row))[0, 0, 0]) // 100 == klass
        for row, klass in zip(splits.train.rows, splits.train.labels.tolist(), strict=True)
    )
    assert seen == [True] * 18


def test_moe_data_that_is_no_folder(home, monkeypatch):
    monkeypatch.setenv("MOE_DATA", str(home / "typo"))
    with pytest.raises(
        FileNotFoundError, match=r"MOE_DATA='.*typo' is not a folder \(looked at .*unset it"
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


def test_hub_without_network_teaches(home, monkeypatch):
    # Read at import, so the variable would come too late.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as caught:
        load_splits(DataSpec(name="hub:someone/birds"))
    text = str(caught.value)
    assert (
        str(home.parent / "cache" / "datasets") in text
        and "run once with network" in text
        and "MOE_DATA/birds" in text
    )


# ---------------------------------------------------------------- damage


def test_truncated_image_names_split_and_row(home):
    images = [encoded(v) for v in range(20)]
    noisy = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(
        noisy, "PNG"
    )
    images[7] = noisy.getvalue()[:600]  # the header reads, the pixels do not
    parquet(home / "torn" / "train.parquet", images, [v % 2 for v in range(20)])
    splits = load_splits(DataSpec(name="torn", image_size=8))
    source = splits.train.source
    assert source.image(6).shape == (3, 8, 8)
    with pytest.raises(
        ValueError,
        match="torn, split train, row 7 .embedded image. does not decode: .*never skipped",
    ):
        source.image(7)


def test_truncated_image_file_is_named(home):
    for klass in ("a", "b"):
        folder = home / "files" / "train" / klass
        folder.mkdir(parents=True)
        for number in range(10):
            (folder / f"{number}.png").write_bytes(encoded(number))
    (home / "files" / "train" / "a" / "3.png").write_bytes(encoded(3)[:20])
    source = load_splits(DataSpec(name="files", image_size=8)).train.source
    with pytest.raises(
        ValueError, match=r"files, split train, row 3 \(.*train/a/3\.png\) does not decode"
    ):
        source.image(3)


def test_truncated_parquet_file_is_named(home):
    parquet(
        home / "cut" / "train.parquet", [encoded(v) for v in range(20)], [v % 2 for v in range(20)]
    )
    whole = (home / "cut" / "train.parquet").read_bytes()
    (home / "cut" / "test-00000-of-00001.parquet").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"cut/test-00000-of-00001\.parquet cannot be read"):
        load_splits(DataSpec(name="cut"))


# ---------------------------------------------------------------- the real sets, where they are

REAL = {  # name: (label column, (train, val, test), some class names in place)
    "cifar100": (
        "fine_label",
        (45_000, 5_000, 10_000),
        {0: "apple", 1: "aquarium_fish", 50: "mouse", 99: "worm"},
    ),
    "eurosat": ("label", (6_000, 1_500, 2_500), {}),
    "solar_pv": ("label", (897, 299, 300), {0: "no_pv", 1: "pv"}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name, monkeypatch):
    if not GIVEN or not (Path(GIVEN) / name).is_dir():
        pytest.skip(f"MOE_DATA has no {name}")
    sources.sources_of.cache_clear()
    label, sizes, names = REAL[name]
    splits = load_splits(DataSpec(name=name, label=label, image_size=32, train=100))
    pools = splits._rows_of_splits(sources.sources_of(name, label, paths.data_home())[0])
    assert tuple(len(pools[split][1]) for split in ("train", "val", "test")) == sizes
    assert {number: splits.class_names[number] for number in names} == names
    if name == "cifar100":
        assert splits.class_names == sorted(splits.class_names) and len(splits.class_names) == 100
        assert counts(splits.val) == [50] * 100 and counts(splits.train) == [1] * 100
        assert not set(pools["train"][1]) & set(pools["val"][1])
    images = splits.train.batch(torch.arange(4), DataSpec(image_size=32))
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


def test_decoded_images_are_kept_up_to_a_limit(monkeypatch):
    calls = []
    source = sources.Source(
        np.zeros(3), lambda row: calls.append(row) or torch.zeros(1, 4, 4, dtype=torch.uint8), 1
    )
    monkeypatch.setattr(sources, "CACHED_BYTES", 32)  # two images of 16 bytes
    for row in (0, 1, 2, 0, 1, 2):
        source.image(row)
    assert calls == [0, 1, 2, 2]
