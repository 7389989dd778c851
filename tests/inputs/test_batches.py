"""A split as a loader: whole, in order or shuffled, and as often as it is asked for."""

from __future__ import annotations

import torch

from lib.inputs.batches import Batches, preprocessing
from lib.inputs.splits import load_splits
from lib.spec import DataSpec, RunSpec

RUN = RunSpec(data=DataSpec(train=25, val=10, test=10, augment="shift"), seed=3)


def whole(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_split_comes_whole_and_in_order_each_time():
    split = load_splits(RUN.data).train
    batches = Batches(split, RUN, size=10)
    assert len(batches) == len(list(batches)) == 3
    for images, labels in (whole(batches), whole(batches)):
        assert torch.equal(labels, split.labels)
        assert torch.equal(images, split.batch(torch.arange(25), RUN))


def test_each_pass_is_shuffled_and_augmented_anew_but_drawn_from_the_seed():
    split = load_splits(RUN.data).train
    batches = Batches(split, RUN, size=10, shuffled=True)
    first, second = whole(batches), whole(batches)
    assert sorted(first[1].tolist()) == sorted(split.labels.tolist())
    assert not torch.equal(first[1], second[1])
    again = Batches(split, RUN, size=10, shuffled=True)
    assert all(map(torch.equal, whole(again), first))
    plain = Batches(split, RUN.but(data={"augment": "none"}), size=10, shuffled=True)
    assert torch.equal(whole(plain)[1], first[1])  # the order alone
    assert not torch.equal(whole(plain)[0], first[0])


def test_what_is_done_to_images_is_said_in_numbers():
    assert preprocessing(RUN, 1) == {"mean": [0.5], "std": [0.5], "size": 28}
    pretrained = RUN.but(backbone={"name": "vit_base_patch16_224", "weights": "timm"})
    said = preprocessing(pretrained, 3)
    assert said["mean"] == said["std"] == [0.5, 0.5, 0.5]  # timm's, of these weights
    assert preprocessing(RUN, 3)["mean"] == [0.485, 0.456, 0.406]
