"""Merging of similar experts, and neurons of dropped experts handed to others: by hand, against
definitions, and where nothing may change."""

from __future__ import annotations

import copy

import pytest
import torch
from one_moe_layer import PROBS, Layer, Toy, constant, refused, tokens_of, toy_images
from torch import nn
from vits import batch, build, moe

from lib.models.compete import responses
from lib.models.ensemble import ensemble
from lib.models.experts import Experts
from lib.models.pruned import stacks_of
from lib.pruning.experts import merging, scores
from lib.routers.top_k import TopKRouter


@pytest.fixture
def images():
    return toy_images()


# ---- merging by output similarity


def test_linkage_by_hand():
    similarity = torch.tensor(
        [[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.3, 0.0], [0.1, 0.3, 1.0, 0.5], [0.2, 0.0, 0.5, 1.0]]
    )
    assert merging.average_linkage(similarity, 3) == [[0, 1], [2], [3]] and merging.average_linkage(
        similarity, 2
    ) == [[0, 1], [2, 3]]


def joined_one_by_one(similarity, clusters):
    """Average linkage as it is defined: every pair of clusters is compared before every join."""
    joined = [[e] for e in range(len(similarity))]
    while len(joined) > clusters:
        pairs = [(i, j) for j in range(len(joined)) for i in range(j)]
        i, j = max(pairs, key=lambda p: similarity[joined[p[0]]][:, joined[p[1]]].mean().item())
        joined[i] = sorted(joined[i] + joined.pop(j))
    return joined


@pytest.mark.parametrize("experts", [4, 8, 16])
def test_linkage_against_its_definition(experts):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        output = torch.randn(5, experts, 3, generator=generator, dtype=torch.float64)
        unit = nn.functional.normalize(output, dim=-1)
        similarity = torch.einsum("tid,tjd->ij", unit, unit) / 5
        for clusters in (1, experts // 2, experts - 1, experts):
            found = merging.average_linkage(similarity, clusters)
            assert found == joined_one_by_one(similarity, clusters)


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
def test_linkage_leaves_as_many_as_asked_for_where_all_are_alike(clusters):
    left = merging.average_linkage(torch.ones(4, 4), clusters)
    assert len(left) == clusters and sorted(sum(left, [])) == [0, 1, 2, 3]
    assert merging.average_linkage(torch.ones(1, 1), 1) == [[0]]


def test_merging_twins_changes_nothing_when_router_rows_are_alike(images):
    model = Toy(experts=4, top_k=1, gate="renormalised").eval()
    with torch.no_grad():
        for stack in stacks_of(model.moe.experts):
            stack[3] = stack[0]
        model.moe.router.weight[3] = model.moe.router.weight[0]
    whole = model(images)
    merged = merging.merge_similar(copy.deepcopy(model), [images], 0.25)
    assert merged.moe.experts.experts == 3
    torch.testing.assert_close(merged(images), whole)


def test_merging_weighs_by_load():
    # The first two point one way, the third the other.
    model = constant(top_k=1, values=(1.0, 10.0, -100.0))
    x = PROBS.log()  # loads: 2 tokens with expert 0, 3 with expert 1, 1 with expert 2
    assert scores.calibrate(model, [x])["moe"].score(0, 0, 0).tolist() == [2, 3, 1]
    merged = merging.merge_similar(copy.deepcopy(model), [x], 1 / 3).moe
    assert merged.experts.fc2.bias[:, 0].tolist() == pytest.approx([(2 * 1 + 3 * 10) / 5, -100.0])
    assert merged.router.weight.tolist()[0] == pytest.approx([0.4, 0.6, 0.0])
    assert merged.router.weight.tolist()[1] == [0.0, 0.0, 1.0]
    assert merged.router.choice_bias.shape == (2,)
    x[..., 2] = 9.0  # nobody goes to the first two: a plain mean
    idle = merging.merge_similar(copy.deepcopy(model), [x], 1 / 3).moe
    assert idle.experts.fc2.bias[0, 0].item() == pytest.approx(5.5)
    torch.testing.assert_close(
        merging.output_similarity(model, [x])["moe"],
        torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64),
    )
    with refused("gives a token 2 experts, but 1 would be left"):
        merging.merge_similar(constant(top_k=2), [x], 2 / 3)
    with refused("mix experts of different members"):
        merging.merge_similar(ensemble(build(moe=moe(experts=4)), 2), [batch()[0]], 0.5)


# ---- neurons of dropped experts handed to others


def test_dern_hands_neurons_to_their_likeness(images):
    model = Toy(experts=2, top_k=1).eval()
    # The second expert is the first with its neurons in another order: nothing new to merge.
    with torch.no_grad():
        order = torch.tensor([2, 0, 1, 5, 4, 3])
        first = [stack[0] for stack in stacks_of(model.moe.experts)]
        for stack, value in zip(
            stacks_of(model.moe.experts),
            (first[0][order], first[1][order], first[2][:, order], first[3]),
            strict=True,
        ):
            stack[1] = value
    kept = merging.dern(copy.deepcopy(model), [images], 0.5)
    torch.testing.assert_close(
        responses(kept.moe.experts, tokens_of(images))[:, 0],
        responses(model.moe.experts, tokens_of(images))[:, 0],
    )


def neurons(*experts):
    """Experts of one input and output, from neurons (fc1 weight, fc1 bias, fc2 weight)."""
    w1, b1, w2 = (
        torch.tensor([[neuron[i] for neuron in expert] for expert in experts]) for i in range(3)
    )
    return Experts.of(
        [
            (w1[e].unsqueeze(1), b1[e], w2[e].unsqueeze(0), torch.zeros(1))
            for e in range(len(experts))
        ]
    )


def test_dern_by_hand():
    """Expert 1 goes; its first neuron joins the second one of expert 0, its second one is like
    none."""
    held = neurons([(1.0, 0.0, 0.0), (0.0, 2.0, 0.0)], [(0.0, 1.0, 0.0), (0.0, 0.0, -3.0)])
    router = TopKRouter(1, 2, 1)
    router.weight.data = torch.tensor([[1.0], [-1.0]])
    model = Layer(router, held).eval()
    x = torch.tensor([[[1.0], [1.0], [-0.5]]])  # two tokens with expert 0, one with expert 1
    gates = scores.calibrate(model, [x])["moe"].score(0, 1, 0)
    a, b = gates.tolist()
    assert a == pytest.approx(2 / (1 + torch.tensor(-2.0).exp().item()), rel=1e-5) and a > b > 0
    cut = merging.dern(model, [x], 0.5).moe
    assert cut.experts.experts == 1 and cut.router.weight.tolist() == [[1.0]]
    assert cut.experts.fc1.weight[0, :, 0].tolist() == [1.0, 0.0] and cut.experts.fc2.weight[
        0, 0
    ].tolist() == [0.0, 0.0]
    assert cut.experts.fc1.bias[0].tolist() == pytest.approx(
        [0.0, (2 * a + 1 * b) / (a + b)], rel=1e-5
    )
