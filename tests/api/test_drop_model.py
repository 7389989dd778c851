"""Whole experts dropped by a loader: by hand, as masked, and refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_classifier import NAMES, images_and_labels, loader, same_state, state_of, vit

import lib

IMAGES, _ = images_and_labels()


def mixture(experts=4, **fields):
    spec = {"layers": 2, "experts": experts, "router": "token", "gate": "renormalised"}
    generator = torch.Generator().manual_seed(3)
    spec |= {"fresh_experts": True, "router_std": 1.0}
    model = lib.upcycle(vit(), lib.MoESpec(**spec | fields), generator=generator)
    return model.eval()


def loads(model):
    with torch.no_grad(), lib.RoutingTape(model) as tape:
        model(IMAGES)
    return [routing.load() for routing in tape.routings()]


def test_the_experts_with_most_tokens_stay_and_tokens_choose_among_them():
    model = mixture()
    state = state_of(model)
    small = lib.drop_experts(model, loader(), 0.5)
    assert same_state(model, state)
    for row, name, load in zip(small.dropping, NAMES, loads(model), strict=True):
        best = load.topk(2).indices.sort().values.tolist()
        assert row == {
            "layer": name,
            "score": "load",
            "missing": "reroute",
            "before": 4,
            "after": 2,
            "kept": best,
        }
    # the plain reference: of the experts that stay the one with the largest logit
    layer, whole = small.blocks[0].mlp, model.blocks[0].mlp
    kept = small.dropping[0]["kept"]
    tokens = torch.randn(1, 30, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        choice = F.linear(tokens[0], whole.router.weight[kept]).argmax(dim=-1)
        weights = list(whole.experts.each())
        want = []
        for token, e in zip(tokens[0], choice.tolist(), strict=True):
            w1, b1, w2, b2 = weights[kept[e]]
            want.append(F.linear(whole.experts.act(F.linear(token, w1, b1)), w2, b2))
        torch.testing.assert_close(layer(tokens)[0], torch.stack(want), atol=1e-5, rtol=1e-5)


def test_zero_updates_equal_a_masked_expert():
    model = mixture()
    small = lib.drop_experts(model, loader(), 0.75, missing="zero_update")
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for block, row in zip(masked.blocks, small.dropping, strict=True):
            [gone] = set(range(4)) - set(row["kept"])
            block.mlp.experts.fc2.weight[gone] = 0
            block.mlp.experts.fc2.bias[gone] = 0
        torch.testing.assert_close(small(IMAGES), masked(IMAGES), atol=1e-5, rtol=0)
        assert not torch.allclose(small(IMAGES), model(IMAGES), atol=1e-3)


def test_changes_are_counted_from_the_model_before():
    before = mixture()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for block, grown in zip(after.blocks, ([0, 3], [1, 2]), strict=True):
            block.mlp.router.weight[grown] *= 1.5
    small = lib.drop_experts(after, None, score="router_norm_change", before=before)
    assert [row["kept"] for row in small.dropping] == [[0, 3], [1, 2]]


def test_merging_and_in_place():
    model = mixture()
    assert lib.drop_experts(model, loader(), score="merge", inplace=True) is model
    assert [(row["after"], row["kept"]) for row in model.dropping] == [(2, None)] * 2
    assert model.blocks[0].mlp.router.weight.shape[0] == 2


def test_modes_and_types_stay():
    model = mixture().to(torch.bfloat16)
    model.blocks[1].train()
    small = lib.drop_experts(model, loader(torch.bfloat16))
    modes = [block.mlp.experts.training for block in small.blocks]
    assert modes == [False, True] and not small.training
    assert all(parameter.dtype == torch.bfloat16 for parameter in small.parameters())


@pytest.mark.parametrize(
    "options, says",
    [
        ({"score": "size"}, "score='size'"),
        ({"missing": "ignore"}, "missing='ignore'"),
        ({"score": "router_change"}, "pass before=, a copy of it"),
        ({"before": mixture()}, "before= is for scores that compare, and score='load' does not"),
        ({"before": 3, "score": "router_change"}, "before is a int: give a torch.nn.Module"),
        ({"before": vit(), "score": "router_change"}, "has no blocks.0.mlp.router.weight"),
        ({"keep": 0.3}, "keep=0.3 of the 4 experts .* a multiple of 1/4"),
        ({"keep": 0}, "keep=0: the share of experts that stays"),
        ({"score": "dern", "missing": "zero_update"}, "set missing='reroute'"),
    ],
)
def test_what_is_refused(options, says):
    model = mixture()
    state = state_of(model)
    with pytest.raises(ValueError, match=says):
        lib.drop_experts(model, loader(), **options)
    assert same_state(model, state)


@pytest.mark.parametrize("score", ["load", "man", "merge"])
def test_images_that_are_not_finite_are_refused(score):
    broken = [(torch.full_like(images, float("nan")), labels) for images, labels in loader()[:1]]
    with pytest.raises(ValueError, match="loader gave images with numbers that are not finite"):
        lib.drop_experts(mixture(), broken, score=score, images=4)


def test_models_without_experts_to_rank_are_refused():
    with pytest.raises(ValueError, match="has no MoELayer whose experts could be ranked"):
        lib.drop_experts(vit(), loader())
    with pytest.raises(ValueError, match="has a CentroidRouter"):
        lib.drop_experts(lib.extract(vit(), loader(), count=2), loader())
    with pytest.raises(ValueError, match="gives a token 2 experts, but 1 would be left"):
        lib.drop_experts(mixture(top_k=2), loader(), 0.25)
