"""ImageNet, written small: as folders of synsets and as the hub's shards, the same images, labels
and names; every fault by its name; and no image in memory before it is asked for."""

from __future__ import annotations

import io
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from data_folders import put
from PIL import Image

from lib.inputs import sources
from lib.inputs.splits import load_splits
from lib.spec import DataSpec

# in the order of their labels; two pairs of the real classes have one word
WORDS = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n15075141": "toilet tissue, toilet paper, bathroom tissue",
}
NAMES = ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)", list(WORDS.values())[-1]]


def jpeg(red: int, green: int, size=(8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (red, green, 0)).save(out, "JPEG", quality=95)
    return out.getvalue()


def pictures(split: str, each: int) -> dict[str, bytes]:
    """{synset/file: picture}, whose red says the class and whose green the number in it."""
    return {
        f"{synset}/{synset}_{i}.JPEG"
        if split == "train"
        else f"{synset}/{split}_{c}{i}.JPEG": jpeg(60 * c, 10 * i)
        for c, synset in enumerate(WORDS)
        for i in range(each)
    }


def folders(home: Path, name: str = "imagenet") -> Path:
    folder = home / name
    for split, each in (("train", 12), ("val", 2)):
        put(folder / split, pictures(split, each))
    lines = [f"{synset} {words}\n" for synset, words in reversed(WORDS.items())]
    (folder / "LOC_synset_mapping.txt").write_text("".join(lines))
    return folder


def shards(folder: Path, split: str, rows: list[tuple[bytes, int]], count: int) -> None:
    """data/SPLIT-00000-of-00020.parquet and so on, as the hub's imagenet-1k has them."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        part = rows[number::count]
        columns = {
            "image": [{"bytes": image, "path": f"{number}.JPEG"} for image, _ in part],
            "label": [label for _, label in part],
        }
        file = folder / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(file))


def by_class(split) -> dict[int, list[tuple[int, ...]]]:
    """{label: the mean colours of its images}, sorted."""
    found: dict[int, list] = {}
    for row, label in zip(split.rows, split.labels.tolist(), strict=True):
        mean = split.source.image(int(row)).float().mean((1, 2)).round().int()
        found.setdefault(label, []).append(tuple(mean.tolist()))
    return {label: sorted(colours) for label, colours in found.items()}


def test_folders_have_words_and_the_order_of_synsets(home):
    folders(home)
    splits = load_splits(DataSpec(name="imagenet", image_size=8))
    assert splits.class_names == NAMES and splits.channels == 3
    # a tenth of train is held out for the test split
    assert (len(splits.train), len(splits.val), len(splits.test)) == (44, 8, 4)
    for label, colours in by_class(splits.val).items():
        for red, green, blue in colours:  # red, green and blue in this order
            assert abs(red - 60 * label) < 4 and green < 14 and blue < 4


def test_shards_of_the_hub_are_the_same_images_labels_and_names(home):
    folders(home)
    for split, each, count in (("train", 12, 4), ("validation", 2, 1)):
        synsets = list(WORDS)
        files = pictures("train" if split == "train" else "val", each).items()
        rows = [(image, synsets.index(name.partition("/")[0])) for name, image in files]
        shards(home / "hub", split, rows, count)
    there = load_splits(DataSpec(name="hub", image_size=8))
    here = load_splits(DataSpec(name="imagenet", image_size=8))
    assert there.class_names == here.class_names
    assert by_class(there.val) == by_class(here.val)
    both = [
        sorted(sum((colours for s in (x.train, x.test) for colours in by_class(s).values()), []))
        for x in (here, there)
    ]
    assert both[0] == both[1] and len(both[0]) == 48


def test_without_the_list_of_words_classes_are_synsets(home):
    (folders(home) / "LOC_synset_mapping.txt").unlink()
    assert load_splits(DataSpec(name="imagenet", image_size=8)).class_names == list(WORDS)


def test_val_named_test_is_what_is_reported(home):
    """The rule for a set whose only labelled splits are train and val."""
    folder = folders(home)
    (folder / "val").rename(folder / "test")
    splits = load_splits(DataSpec(name="imagenet", image_size=8))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (44, 4, 8)


def flat(folder: Path) -> None:
    for file in list((folder / "val").glob("*/*")):
        file.rename(folder / "val" / f"ILSVRC2012_val_0000{file.stem[-2:]}.JPEG")
    for sub in (folder / "val").iterdir():
        if sub.is_dir():
            sub.rmdir()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (flat, r"val_000000.JPEG lies in no class folder: .*LOC_val_solution.csv.*another order"),
        (
            lambda f: put(f, {"test/ILSVRC2012_test_00000001.JPEG": jpeg(0, 0)}),
            "has no label: those of ImageNet's test pictures are not published",
        ),
        (
            lambda f: put(f, {"val/n99999999/x.JPEG": jpeg(0, 0)}),
            "n99999999: class n99999999 has no training picture",
        ),
        (
            lambda f: put(f, {"train/x.JPEG": jpeg(0, 0)}),
            "train/x.JPEG lies in no class folder",
        ),
        (
            lambda f: [file.unlink() for file in (f / "train" / "n02012849").iterdir()],
            "n02012849 holds no picture",
        ),
        (
            lambda f: (f / "train" / "n02012849" / "n02012849_1.JPEG").write_bytes(b""),
            "n02012849_1.JPEG is empty",
        ),
        (
            lambda f: (f / "LOC_synset_mapping.txt").write_text("n01440764 tench\n"),
            "has no words for class n02012849 .3 such in all",
        ),
        (
            lambda f: (f / "LOC_synset_mapping.txt").write_text("n01440764 a\nn01440764 b\n"),
            "line 2: 'n01440764 b' is no synset that is new here",
        ),
        (
            lambda f: (f / "LOC_synset_mapping.txt").write_text("tench n01440764\n"),
            "line 1: 'tench n01440764' is no synset",
        ),
    ],
)
def test_folders_that_do_not_add_up(home, spoil, says):
    spoil(folders(home))
    with pytest.raises(ValueError, match=says):
        load_splits(DataSpec(name="imagenet"))


def test_a_damaged_picture_is_named(home):
    folder = folders(home)
    file = folder / "train" / "n01440764" / "n01440764_0.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="n01440764_0.JPEG does not decode"):
        load_splits(DataSpec(name="imagenet")).train.source.image(0)


# ---- shards


def noise(seed: int) -> bytes:
    """A picture of about 480 kB, which no format makes smaller."""
    pixels = np.random.default_rng(seed).integers(0, 256, (400, 400, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=0)
    return out.getvalue()


def read_by_this_process() -> int:
    """Bytes that reading calls gave so far; mapped files do not count."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_opening_shards_leaves_their_images_on_disk(home):
    rows = [(noise(i), i % 4) for i in range(40)]
    shards(home / "hub", "train", rows, 20)
    of_images = sum(len(image) for image, _ in rows)
    before = pa.total_allocated_bytes()
    spec = DataSpec(name="hub", image_size=8)
    splits = load_splits(spec)  # writes the table that is mapped
    assert pa.total_allocated_bytes() - before < of_images / 20
    sources.forget()
    before = read_by_this_process()
    splits = load_splits(spec)
    # the ends of the files, 64 kB twice each, where their tables of contents are, and labels
    assert read_by_this_process() - before < of_images / 4
    row = int(splits.train.rows[3])
    assert splits.train.source.image(row).shape == (3, 400, 400)
    assert pa.total_allocated_bytes() < of_images / 4


def test_shards_that_do_not_add_up(home):
    rows = [(jpeg(60 * (i % 4), i), i % 4) for i in range(40)]
    folder = home / "hub"
    shards(folder, "train", rows, 20)
    whole = (folder / "data" / "train-00007-of-00020.parquet").read_bytes()

    def refused(says):
        sources.forget()
        with pytest.raises(ValueError, match=says):
            load_splits(DataSpec(name="hub"))

    (folder / "data" / "train-00007-of-00020.parquet").write_bytes(whole[: len(whole) // 2])
    refused("train-00007-of-00020.parquet cannot be read as parquet")
    (folder / "data" / "train-00007-of-00020.parquet").unlink()
    refused("part 7 of 20 is not there")
    (folder / "data" / "train-00007-of-00020.parquet").write_bytes(whole)
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(whole)
    refused("they overlap")
    (folder / "data" / "train-00000-of-00001.parquet").unlink()
    unlabelled = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    columns = {"image": [{"bytes": jpeg(0, 0), "path": None}], "label": [-1]}
    test = datasets.Dataset.from_dict(columns, features=unlabelled)
    test.to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    refused("row 0: label -1 is none of its 4 classes.*-1 stands for no label")


def test_a_batch_is_of_the_images_and_labels_that_it_names(home):
    folders(home)
    spec = DataSpec(name="imagenet", image_size=8)
    val = load_splits(spec).val
    batch = val.batch(torch.arange(8), spec)
    reds = batch[:, 0].mean((1, 2))
    assert torch.equal(reds.argsort(stable=True).sort().values, torch.arange(8))
    assert all(reds[i] < reds[i + 2] for i in range(6))  # two of a class, in order of the labels
