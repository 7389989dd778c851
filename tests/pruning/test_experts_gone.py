"""Whole experts: scores by hand, what is left when some are dropped, ensembles, competition."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from one_moe_layer import B, D, E, H, K, N, Toy, reloaded, tokens_of, toy_images
from torch import nn

from lib.models.compete import CompeteLayer, competition_loss
from lib.models.ensemble import ensemble
from lib.models.experts import Experts
from lib.models.moe import RoutingTape
from lib.models.upcycle import upcycle
from lib.pruning.experts import dropping, scores
from lib.routers.top_k import TopKRouter
from lib.spec import MoESpec


@pytest.fixture
def images():
    return toy_images()


def outputs(layer, rows):
    """(E, T, D), every expert on every row, one by one."""
    return torch.stack(
        [
            nn.functional.gelu(rows @ w1.t() + b1) @ w2.t() + b2
            for w1, b1, w2, b2 in layer.experts.each()
        ]
    )


# ---- scores


@pytest.mark.parametrize("convolutions", [True, False])
def test_rows_are_tokens_where_a_layer_has_its_channels_first_or_last(convolutions):
    """Of maps as wide as they have channels no shape tells the two apart."""
    model = timm.create_model(
        "convnext_atto",
        num_classes=4,
        depths=(1, 1, 1, 1),
        dims=(8, 8, 8, 8),
        conv_mlp=convolutions,
    )
    upcycle(model, blocks=(1,), experts=2, router="token")  # 8 x 8 places, 8 channels
    [(name, layer)] = dropping.routed(model).items()
    assert layer.channels_first == convolutions
    given, seen = [], []
    layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores.observe(model, [images], lambda name, layer, rows, routing: seen.append(rows))
    [x], [rows] = given, seen
    tokens = x.permute(0, 2, 3, 1) if convolutions else x
    assert tokens.shape == (2, 8, 8, 8) and torch.equal(rows, tokens.reshape(-1, 8))


def test_scores_from_weights_by_hand():
    model = Toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.moe.router.weight.copy_(torch.tensor([[3.0, 4, 0, 0], [0, 0, 1, 0], [0, 2, 0, 0]]))
        before["moe.router.weight"] = torch.tensor([[0.0, 0, 5, 0], [0, 0, 3, 0], [1, 0, 0, 0]])
        model.moe.experts.fc1.bias[1] += 2.0  # of H = 6 neurons
    found = {
        name: scores.scores(model, name, before=before)["moe"].tolist() for name in scores.NAMES[:5]
    }
    # The first turned and kept its norm.
    assert found["router_norm_change"] == pytest.approx([0.0, -2.0, 1.0])
    assert found["router_norm_change_abs"] == pytest.approx([0.0, 2.0, 1.0])
    assert found["router_change"] == pytest.approx([50**0.5, 2.0, 5**0.5])
    assert found["router_norm"] == pytest.approx([5.0, 1.0, 2.0])
    assert found["weight_change"] == pytest.approx([0.0, 24**0.5, 0.0], abs=1e-6)


def test_measured_scores_by_hand(images):
    model = Toy()
    rows = tokens_of(images)
    probs = (rows @ model.moe.router.weight.t()).softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(K).indices, 1.0).bool()
    size = outputs(model.moe, rows).norm(dim=-1).t()  # (T, E)
    calibration = scores.calibrate(model, [images[:1], images[1:]])
    for name, (b, a, c) in scores.MEASURED.items():
        want = [
            (probs[chosen[:, e], e] ** a * size[chosen[:, e], e] ** c).sum()
            / chosen[:, e].sum() ** b
            for e in range(E)
        ]
        found = scores.scores(model, name, calibration=calibration)["moe"]
        assert found.tolist() == pytest.approx([w.item() for w in want], rel=1e-5), name
    assert model.training and calibration["moe"].sums[0, 0].sum() == B * N * K


def test_an_expert_without_tokens_scores_zero_and_its_removal_changes_nothing(images):
    model = Toy(top_k=1, gate="renormalised").eval()
    with torch.no_grad():
        images = images.abs()
        model.moe.router.weight[1] = -10.0  # all tokens are positive: nobody chooses it
    calibration = scores.calibrate(model, [images])
    assert all(
        scores.scores(model, name, calibration=calibration)["moe"][1] == 0
        for name in scores.MEASURED
    )
    whole = model(images)
    for semantics in dropping.SEMANTICS:
        cut = dropping.drop_experts(copy.deepcopy(model), {"moe": [0, 2]}, semantics)
        assert cut.moe.experts.experts == 2
        torch.testing.assert_close(cut(images), whole, rtol=1e-5, atol=1e-6)


def test_keep_by_score():
    found = {"a": torch.tensor([1.0, 3.0, 1.0, 0.0]), "b": torch.tensor([0.0, 0.0, 0.0, 5.0])}
    assert {name: kept.tolist() for name, kept in scores.keep_by_score(found, 0.5).items()} == {
        "a": [0, 1],
        "b": [0, 3],
    }
    for share, says in ((1.0, "leaves none"), (0.3, "is 1.2 experts"), (-0.5, "leaves none")):
        with pytest.raises(ValueError, match=says):
            scores.keep_by_score(found, share)
    with pytest.raises(ValueError, match="not finite"):
        scores.keep_by_score({"a": torch.tensor([1.0, float("nan")])}, 0.5)


# ---- removal


def test_both_semantics_against_the_plain_sum(images):
    model = Toy().eval()
    rows, kept = tokens_of(images), [0, 2]
    logits = rows @ model.moe.router.weight.t()
    every = outputs(model.moe, rows)
    whole = logits.softmax(-1)
    taken = torch.zeros_like(whole).scatter(1, whole.topk(K).indices, 1.0)
    taken[:, 1] = 0.0  # a token sent to the dropped expert gets nothing from that choice
    zero = torch.einsum("te,etd->td", whole * taken, every)
    left = logits[:, kept].softmax(-1)
    among = torch.einsum("te,etd->td", left, every[kept])  # K = 2 of the two that are left
    for semantics, want in (("zero_update", zero), ("reroute", among)):
        cut = dropping.drop_experts(copy.deepcopy(model), {"moe": kept}, semantics)
        with RoutingTape(cut) as tape:
            torch.testing.assert_close(cut(images).reshape(-1, D), want)
        [(_, routing)] = list(tape)
        assert routing.probs.shape == (B * N, E if semantics == "zero_update" else 2)
        again = reloaded(Toy(), cut.state_dict()).eval()
        assert torch.equal(again(images), cut(images))
    assert int(routing.dropped.sum()) == 0


def test_what_cannot_be_dropped_is_refused_and_nothing_changes(images):
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    for keep, semantics, says in (
        ({"moe": []}, "reroute", "no expert of moe would be left"),
        ({"moe": [0, 3]}, "reroute", "out of 0..2"),
        ({"mlp": [0]}, "reroute", "no MoE layer mlp"),
        ({"moe": [0]}, "reroute", "gives a token 2 experts, but 1 would be left"),
        ({"moe": [0, 1]}, "residual", "zero_update, reroute"),
    ):
        with pytest.raises(ValueError, match=says):
            dropping.drop_experts(model, keep, semantics)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, given, says in (
        ("router_change", {}, "needs the state dict before"),
        ("ean", {}, "needs calibration"),
        ("random", {}, "needs a torch.Generator"),
        ("loud", {}, "is unknown"),
        ("router_norm_change", {"before": {}}, "has no moe.router.weight"),
    ):
        with pytest.raises(ValueError, match=says):
            scores.scores(model, name, **given)
    with pytest.raises(ValueError, match="is pruned already"):
        scores.scores(dropping.drop_experts(model, {"moe": [0, 1]}, "zero_update"), "router_norm")


# ---- ensembles, competition, dropping on the way


def small_vit(experts=4, top_k=1):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    return upcycle(
        model, MoESpec(layers=1, experts=experts, top_k=top_k, router="token", router_std=1.0)
    ).eval()


def test_one_member_is_the_model_and_members_stay_in_their_group():
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    plain = small_vit()
    torch.testing.assert_close(
        ensemble(copy.deepcopy(plain), 1)(images), plain(images).log_softmax(-1)
    )
    two = ensemble(copy.deepcopy(plain), 2)
    with RoutingTape(two) as tape:
        found = two(images)
    [(_, routing)] = list(tape)
    by_member = routing.choice.view(2, -1)
    assert by_member[0].max() < 2 <= by_member[1].min() and len(by_member[0].unique()) == 2
    torch.testing.assert_close(found.exp(), two.members(images).softmax(-1).mean(dim=0))
    for model, members, says in (
        (small_vit(), 3, "does not divide"),
        (small_vit(top_k=2), 4, "a group has 1"),
        (nn.Linear(2, 2), 2, "cannot be an ensemble"),
    ):
        with pytest.raises(ValueError, match=says):
            ensemble(model, members)


def test_competition_by_response_norm_and_its_router_loss(images):
    torch.manual_seed(0)
    layer = CompeteLayer(TopKRouter(D, E, 1, std=1.0), Experts(E, D, H), rate=1.0)
    with torch.no_grad():
        layer.experts.fc2.bias[2] += 5.0  # the loudest everywhere
    x = images.flatten(2).transpose(1, 2)
    with RoutingTape(layer) as tape:
        layer.train()(x)
    routing = tape[layer]
    size = outputs(layer, x.reshape(-1, D)).norm(dim=-1).t()
    torch.testing.assert_close(routing.probs, size.softmax(-1))
    assert routing.choice.unique().tolist() == [2]
    competition_loss(routing).backward()
    assert layer.router.weight.grad.abs().sum() > 0 and layer.experts.fc1.weight.grad is None
    with RoutingTape(layer) as tape:
        layer.eval()(x)
    assert (
        torch.equal(tape[layer].choice, layer.router(x).choice)
        and competition_loss(tape[layer]).item() == 0.0
    )
    with pytest.raises(ValueError, match="rate=0"):
        CompeteLayer(TopKRouter(D, E, 1), Experts(E, D, H), rate=0)
