"""Loaders: drawn from by class in one pass, and refused by name."""

from __future__ import annotations

import pytest
import torch
from small_classifier import CLASSES, images_and_labels, loader, vit
from torch.utils.data import DataLoader, TensorDataset

import lib
from lib.api.loaders import CALIBRATION_BATCH, batches_of, calibration_images, check_loader


class Counted:
    """A loader without a length that says how often it was read, and keeps nothing."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        yield from self.batches


def unbalanced(count=300):
    """Images that are their own number, of classes of 3, 60 and 237."""
    labels = torch.tensor([0] * 3 + [1] * 60 + [2] * (count - 63))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    images = torch.arange(count, dtype=torch.float32)[order].view(-1, 1, 1, 1).expand(-1, 3, 14, 14)
    return list(zip(images.split(32), labels[order].split(32), strict=True))


@pytest.mark.parametrize(
    "most, counts", [(30, [3, 13, 14]), (100, [3, 48, 49]), (400, [3, 60, 237])]
)
def test_images_are_drawn_by_class_with_the_smallest_keys(most, counts):
    source = Counted(unbalanced())
    drawn = calibration_images(source, vit(), most, seed=3)
    labels = torch.cat([labels for _, labels in drawn])
    numbers = torch.cat([images[:, 0, 0, 0] for images, _ in drawn]).tolist()
    assert source.passes == 1
    # the two large classes have equally many up to one
    assert sorted(labels.bincount().tolist()) == sorted(counts)
    generator = torch.Generator().manual_seed(3)
    key = {}
    for images, of_images in source.batches:
        keys = torch.rand(len(of_images), generator=generator).tolist()
        drawn_keys = zip(keys, of_images.tolist(), strict=True)
        key |= dict(zip(images[:, 0, 0, 0].tolist(), drawn_keys, strict=True))
    for c in range(3):
        all_of_class = sorted((k, number) for number, (k, label) in key.items() if label == c)
        mine = {
            number for number, label in zip(numbers, labels.tolist(), strict=True) if label == c
        }
        assert mine == {number for _, number in all_of_class[: len(mine)]}
    sizes = [len(of) for _, of in drawn]
    assert max(sizes) <= CALIBRATION_BATCH and max(sizes) - min(sizes) <= 1
    assert drawn[0][1][:6].tolist() == [0, 1, 2, 0, 1, 2]  # each class in turn


def test_a_shuffling_loader_gives_the_same_images_for_a_seed_and_no_global_draw():
    shuffling = DataLoader(TensorDataset(*images_and_labels()), batch_size=8, shuffle=True)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, again, other = (calibration_images(shuffling, vit(), 10, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    model = vit()
    torch.manual_seed(11)
    lib.prune(model, shuffling)
    lib.prune(model, shuffling, score="taylor")
    lib.extract(model, shuffling, count=3)
    assert torch.equal(torch.get_rng_state(), state)


IMAGES, LABELS = images_and_labels()
MORE = {"image": IMAGES, "label": LABELS}


@pytest.mark.parametrize(
    "bad, says",
    [
        ((pair for pair in loader()), "loader is a generator, which can be read once only"),
        (iter(loader()), "list_iterator, which can be read once only"),
        (map(tuple, loader()), "loader is a map, which can be read once only"),
        (None, "loader is a NoneType: give what can be iterated"),
        (IMAGES, "loader is a Tensor: give"),
        (MORE, "loader is a dict: give"),
        (3, "loader is a int, which cannot be iterated"),
        ([], "gave no batch"),
        ([MORE], "gave a dict with image, label"),
        ([(IMAGES, LABELS, LABELS)], "gave a tuple of 3: give pairs"),
        ([IMAGES], "gave a Tensor: give pairs"),
        (TensorDataset(IMAGES, LABELS), r"shape \(3, 14, 14\)"),
        ([(IMAGES[0], 3)], r"gave \(Tensor, int\).*DataLoader\(loader, batch_size=64\)"),
        ([(IMAGES.to(torch.uint8), LABELS)], "torch.uint8: they must be normalised floats"),
        ([(IMAGES[:0], LABELS[:0])], r"images of shape \(0, 3, 14, 14\)"),
        ([(IMAGES, LABELS[:3])], r"labels of shape \(3,\) .* for 40 images"),
        ([(IMAGES, torch.eye(CLASSES)[LABELS])], r"shape \(40, 5\) and type torch.float32"),
        (
            [(IMAGES.to("meta"), LABELS)],
            r"images on meta, .* on cpu; .*lib.on_device\(loader, 'cpu'",
        ),
        ([(IMAGES, LABELS.to("meta"))], "labels on meta"),
        ([(IMAGES.double(), LABELS)], r"images of torch.float64, .* images.to\(torch.float32\)"),
    ],
)
def test_what_is_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        list(batches_of(bad, vit(), "read"))


def test_every_function_refuses_a_generator_before_it_reads():
    model = vit()
    mixture = lib.upcycle(vit(), lib.MoESpec(layers=2, experts=4, router="token"))
    read = []

    def once():
        read.append(1)
        yield from loader()

    for call in (
        lambda: lib.prune(model, once()),
        lambda: lib.prune(model, once(), score="taylor"),
        lambda: lib.extract(model, once()),
        lambda: lib.drop_experts(mixture, once()),
        lambda: lib.finetune(model, once()),
        lambda: lib.finetune(model, loader(), once()),
    ):
        with pytest.raises(ValueError, match="generator, which can be read once only"):
            call()
    assert not read


def test_images_of_different_shapes_are_refused():
    bad = [(torch.zeros(2, 3, s, s), torch.tensor([0, 1])) for s in (14, 28)]
    with pytest.raises(ValueError, match=r"different shapes, \(3, 14, 14\), \(3, 28, 28\)"):
        calibration_images(bad, vit(), 10, 0)


def test_a_model_on_two_devices_and_what_is_no_model():
    model = vit()
    model.head.to("meta")
    with pytest.raises(ValueError, match="lie on cpu and meta: it must lie on one device"):
        lib.prune(model, loader())
    with pytest.raises(ValueError, match="model is a OrderedDict: give a torch.nn.Module"):
        lib.prune(model.state_dict(), loader())


def test_on_device_moves_what_is_read_and_keeps_the_length():
    moved = lib.on_device(loader(), "meta")
    assert len(moved) == 5 and all(x.is_meta and y.is_meta for x, y in moved)
    assert len(list(moved)) == 5  # it can be read again
    streamed = lib.on_device(Counted(loader()), "cpu")
    assert sum(len(y) for _, y in batches_of(streamed, vit(), "read")) == 40
    with pytest.raises(ValueError, match="read once only"):
        lib.on_device(iter(loader()), "cpu")
    check_loader(moved)
