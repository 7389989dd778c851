"""Calibration images that come from a generator count like those of a list; none at all are
refused."""

from __future__ import annotations

import copy

import pytest
import torch
from vits import batch, build, moe

from lib.pruning.experts.merging import dern, merge_similar
from lib.pruning.neurons.masks import mask_weights
from lib.pruning.neurons.scores import expert_scores, neuron_scores, removal_effects

BATCHES = [batch(6, seed) for seed in (1, 2)]


def generated(batches):
    yield from batches


def same(one, other):
    assert list(one) == list(other) and one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_scores_from_a_generator():
    model = build(moe=moe())
    for kind in ("taylor", "molchanov"):
        of_list = neuron_scores(model, BATCHES, kind)
        same(neuron_scores(model, generated(BATCHES), kind), of_list)
        same(neuron_scores(model, map(tuple, BATCHES), kind), of_list)
    by_expert = [BATCHES, BATCHES[:1], BATCHES[1:]]
    same(
        expert_scores(model, (generated(batches) for batches in by_expert)),
        expert_scores(model, by_expert),
    )


def test_masks_from_a_generator():
    one, other = build(moe=moe()), build(moe=moe())
    same(mask_weights(one, generated(BATCHES), 0.5), mask_weights(other, BATCHES, 0.5))


def test_effects_from_a_generator():
    """The loss is measured once for each neuron, on all images."""
    model = build()
    effects = removal_effects(model, "blocks.0.mlp", BATCHES, [3, 7])
    assert torch.equal(removal_effects(model, "blocks.0.mlp", generated(BATCHES), [3, 7]), effects)


@pytest.mark.parametrize("merge", [merge_similar, dern])
def test_merging_from_a_generator(merge):
    model = build(moe=moe(4))
    images = [images for images, _ in BATCHES]
    merged = merge(copy.deepcopy(model), images, 0.5).state_dict()
    same(merge(model, generated(images), 0.5).state_dict(), merged)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, none: neuron_scores(model, none),
        lambda model, none: expert_scores(model, [none] * 3),
        lambda model, none: mask_weights(model, none, 0.5),
        lambda model, none: removal_effects(model, "blocks.0.mlp", none, [0]),
        lambda model, none: merge_similar(model, none, 1 / 3),
        lambda model, none: dern(model, none, 1 / 3),
    ],
)
def test_an_exhausted_generator_is_refused(call):
    used = generated(BATCHES)
    list(used)
    with pytest.raises(ValueError, match="needs? at least one|empty"):
        call(build(moe=moe()), used)
