"""CIFAR's binary version, written small: pixels, labels, splits as documented, faults by name."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from data_folders import parquet
from PIL import Image

from lib.inputs.splits import load_splits
from lib.spec import DataSpec

FINE = ["apple", "bear", "crab", "dolphin"]
COARSE = ["fish and fruit", "mammals"]
COARSE_OF = [0, 1, 0, 1]


def pixels(rng) -> np.ndarray:
    return rng.integers(0, 256, (3, 32, 32), np.uint8)  # channel by channel, row by row


def hundred(home, train=40, test=8, name="cifar-100-binary"):
    """Returns the folder and, by split, the images in their order."""
    folder, rng, images = home / name, np.random.default_rng(0), {}
    folder.mkdir()
    for split, count in (("train", train), ("test", test)):
        images[split] = [pixels(rng) for _ in range(count)]
        records = [
            bytes([COARSE_OF[i % 4], i % 4]) + image.tobytes()
            for i, image in enumerate(images[split])
        ]
        (folder / f"{split}.bin").write_bytes(b"".join(records))
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
    return folder, images


def ten(home):
    folder, rng, images = home / "cifar-10-batches-bin", np.random.default_rng(1), []
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = [(len(images) + i) % 2 for i in range(8)]
        parts = [pixels(rng) for _ in records]
        images += parts
        content = [bytes([label]) + p.tobytes() for label, p in zip(records, parts, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(content))
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    return folder, images


def test_cifar_100(home):
    _, images = hundred(home)
    fine = load_splits(DataSpec(name="cifar-100-binary", image_size=32, label="fine_label"))
    assert fine.class_names == FINE and fine.channels == 3
    assert (len(fine.train), len(fine.val), len(fine.test)) == (36, 4, 8)
    assert fine.test.labels.tolist() == [0, 1, 2, 3] * 2
    for split, name in ((fine.train, "train"), (fine.val, "train"), (fine.test, "test")):
        for row, label in zip(split.rows.tolist(), split.labels.tolist(), strict=True):
            assert np.array_equal(split.source.image(row).numpy(), images[name][row])
            assert label == row % 4
    coarse = load_splits(DataSpec(name="cifar-100-binary", image_size=32, label="coarse_label"))
    assert coarse.class_names == COARSE and coarse.test.labels.tolist() == [0, 1] * 4


def test_cifar_10(home):
    _, images = ten(home)
    splits = load_splits(DataSpec(name="cifar-10-batches-bin", image_size=32))
    assert splits.class_names == ["airplane", "automobile"]
    assert (len(splits.train), len(splits.val), len(splits.test)) == (36, 4, 8)
    for row in splits.train.rows.tolist():  # of five files, one after the other
        assert np.array_equal(splits.train.source.image(row).numpy(), images[row])
    assert np.array_equal(splits.test.source.image(0).numpy(), images[40])


def test_the_hub_s_table_is_the_same_set(home):
    """Red comes first in both, and a label means one class."""
    _, images = hundred(home)
    for split, parts in images.items():
        encoded = []
        for image in parts:
            out = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(out, "PNG")
            encoded.append(out.getvalue())
        labels = [i % 4 for i in range(len(parts))]
        parquet(home / "hub" / f"{split}-00000-of-00001.parquet", encoded, labels, FINE)
    here = load_splits(DataSpec(name="cifar-100-binary", image_size=32, label="fine_label"))
    there = load_splits(DataSpec(name="hub", image_size=32))
    assert here.class_names == there.class_names
    for ours, other in ((here.train, there.train), (here.val, there.val), (here.test, there.test)):
        assert torch.equal(ours.labels, other.labels)
        index = torch.arange(len(ours))
        spec = DataSpec(name="hub", image_size=32)
        assert torch.equal(ours.batch(index, spec), other.batch(index, spec))


def first_bytes(file, change):
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-100]),
            "train.bin has 122,860 bytes, and a record 3,074: it is half copied",
        ),
        (
            lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-3074]),
            "class dolphin has 9 images and apple 10, and all classes of CIFAR have as many",
        ),
        (lambda f: (f / "test.bin").write_bytes(b""), "test.bin has 0 bytes"),
        (
            lambda f: first_bytes(f / "test.bin", lambda c: c.__setitem__(1, 77)),
            "test.bin, row 0: label 77 is none of the 4 classes",
        ),
        (lambda f: (f / "test.bin").unlink(), "has no test.bin: it needs train.bin, test.bin"),
        (lambda f: (f / "train.bin").unlink(), "has no train.bin"),
        (lambda f: (f / "fine_label_names.txt").unlink(), "fine_label_names.txt is not there"),
        (
            lambda f: (f / "fine_label_names.txt").write_text("apple\napple\n"),
            "has 2 names, 1 of them different",
        ),
        (lambda f: (f / "extra.bin").write_bytes(b"x"), "has extra.bin, which CIFAR has not"),
    ],
)
def test_files_that_do_not_add_up(home, spoil, says):
    spoil(hundred(home)[0])
    with pytest.raises(ValueError, match=says):
        load_splits(DataSpec(name="cifar-100-binary", label="fine_label"))


def test_five_files_of_training_are_needed(home):
    folder, _ = ten(home)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match="has no data_batch_3.bin"):
        load_splits(DataSpec(name="cifar-10-batches-bin"))


def test_labels_are_those_of_the_version(home):
    hundred(home)
    with pytest.raises(ValueError, match="has no label 'label'; it has coarse_label, fine_label"):
        load_splits(DataSpec(name="cifar-100-binary"))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("names", [("train", "test", "meta"), ("data_batch_1", "batches.meta")])
def test_pickles_are_refused_unread(home, names):
    (home / "cifar").mkdir()
    for name in names:
        (home / "cifar" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is the Python version of CIFAR.*take the binary version"):
        load_splits(DataSpec(name="cifar"))
