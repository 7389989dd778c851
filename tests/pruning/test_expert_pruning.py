"""Dropping experts beyond the plain cases: numbers written out, capacities, images, ensembles, and
every refusal.

`test_experts_gone.py` has the scores and the two semantics against a plain sum.
"""

from __future__ import annotations

import copy

import pytest
import torch
from one_moe_layer import PROBS, Layer, constant, refused, reloaded, run
from torch import nn
from vits import batch, build, moe

from lib.measure.cost import count
from lib.models.compete import CompeteLayer, competition_loss
from lib.models.ensemble import ensemble
from lib.models.experts import Experts
from lib.models.moe import RoutingTape
from lib.pruning.experts import dropping, scores
from lib.routers.all import AllExperts
from lib.routers.expert_choice import ExpertChoiceRouter
from lib.routers.group import GroupRouter
from lib.routers.priority import PriorityRouter
from lib.routers.top_k import TopKRouter

# ---------------------------------------------------------------- removal, written out


def test_zero_updates_and_rerouting_by_hand():
    zero, routing = run(
        dropping.drop_experts(constant(), {"moe": torch.tensor([2, 0])}, "zero_update"), PROBS.log()
    )
    # Choices 01, 12, 20, 12, 01, 10; expert 1 is gone and gives nothing, the gates of the others
    # stay as they were.
    assert zero.tolist() == pytest.approx([0.5, 30.0, 50.3, 30.0, 0.6, 0.2])
    torch.testing.assert_close(routing.probs, PROBS.view(6, 3))
    assert routing.dropped.tolist() == [1, 1, 0, 1, 1, 1] and routing.load().tolist() == [4, 0, 3]
    # what the router wanted
    assert routing.choice.tolist() == [[0, 1], [1, 2], [2, 0], [1, 2], [0, 1], [1, 0]]
    # every number moves down
    zero, routing = run(
        dropping.drop_experts(constant(), {"moe": [1, 2]}, "zero_update"), PROBS.log()
    )
    assert zero.tolist() == pytest.approx(
        [3.0, 35.0, 50.0, 36.0, 3.0, 7.0]
    ) and routing.load().tolist() == [0, 5, 3]
    moved, routing = run(dropping.drop_experts(constant(), {"moe": [0, 2]}, "reroute"), PROBS.log())
    # Both survivors, gates over the two.
    want = [(a + 100 * c) / (a + c) for a, _, c in PROBS.view(6, 3).tolist()]
    assert (
        moved.tolist() == pytest.approx(want, rel=1e-5)
        and routing.probs.shape == (6, 2)
        and not routing.dropped.any()
    )


def test_rerouting_under_a_printed_gate_scales_tokens_that_never_chose_the_dropped():
    whole, _ = run(constant(top_k=1), PROBS.log())
    cut, _ = run(dropping.drop_experts(constant(top_k=1), {"moe": [0, 1]}, "reroute"), PROBS.log())
    assert whole[0].item() == pytest.approx(0.5) and cut[0].item() == pytest.approx(0.5 / (1 - 0.2))
    x = PROBS.log()
    x[..., 2] = -200.0  # a probability of nothing in float32: then nobody's gate moves
    whole, _ = run(constant(top_k=1), x)
    assert torch.equal(
        run(dropping.drop_experts(constant(top_k=1), {"moe": [0, 1]}, "reroute"), x)[0], whole
    )


def test_all_tokens_may_lose_their_experts():
    x = PROBS.log()
    x[..., 1] = 5.0
    model = dropping.drop_experts(constant(top_k=1), {"moe": [0, 2]}, "zero_update")
    out, routing = run(model, x)
    assert not out.any() and routing.token.numel() == 0 and routing.dropped.tolist() == [1] * 6
    shared = nn.Linear(3, 3)
    model.moe.shared = shared
    assert torch.equal(model(x), shared(x))  # what is left of the layer


def test_capacity_counts_all_experts_under_zero_updates_and_the_survivors_when_rerouting():
    x = PROBS.log()
    x[..., 0] = 5.0  # all six tokens want expert 0
    slots = {
        semantics: dropping.drop_experts(
            constant(top_k=1, capacity_factor=1.0), {"moe": [0, 1]}, semantics
        )
        for semantics in dropping.SEMANTICS
    }
    assert run(slots["zero_update"], x)[1].load().tolist() == [2, 0, 0]  # 6 / 3
    assert run(slots["reroute"], x)[1].load().tolist() == [3, 0]  # 6 / 2
    assert run(slots["zero_update"], x)[1].dropped.sum() == 4


def test_one_decision_an_image():
    model = dropping.drop_experts(constant(top_k=1, per_image=True), {"moe": [0]}, "zero_update")
    out, routing = run(model, PROBS.log())
    # Expert 1 of the second image is gone.
    assert out.tolist() == pytest.approx([0.5] * 3 + [0.0] * 3) and routing.per_image
    assert routing.dropped.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "make", [lambda: ExpertChoiceRouter(3, 3, choices=2.0), lambda: PriorityRouter(3, 3)]
)
def test_other_linear_routers(make):
    model = constant()
    model.moe.router = make()
    model.moe.router.weight.data = torch.eye(3)
    before = run(model, PROBS.log())[1]
    _, zero = run(
        dropping.drop_experts(copy.deepcopy(model), {"moe": [0, 2]}, "zero_update"), PROBS.log()
    )
    assert zero.load().tolist() == [before.load()[0], 0, before.load()[2]]
    _, moved = run(dropping.drop_experts(model, {"moe": [0, 2]}, "reroute"), PROBS.log())
    assert moved.experts == 2 and moved.load()[0] == moved.load()[1] > 0
    if isinstance(model.moe.router, ExpertChoiceRouter):
        with refused("gives a token 2 experts, but 1 would be left"):
            dropping.drop_experts(model, {"moe": [0]}, "reroute")


@pytest.mark.parametrize("semantics", dropping.SEMANTICS)
def test_in_a_vit_with_gradients_flags_costs_and_reload(semantics):
    model = build(moe=moe(experts=4, layers=2, shared=True))
    images, labels = batch()
    model.blocks[0].mlp.experts.requires_grad_(False)
    model.blocks[1].train()
    keep = {"blocks.0.mlp": [3, 1], "blocks.1.mlp": [0, 2]}
    cut = dropping.drop_experts(copy.deepcopy(model), keep, semantics)
    assert (
        not cut.blocks[0].mlp.training
        and cut.blocks[1].mlp.training
        and cut.blocks[1].mlp.experts.training
    )
    first = cut.blocks[0].mlp.experts
    assert (
        torch.equal(first.fc1.weight, model.blocks[0].mlp.experts.fc1.weight[[1, 3]])
        and not first.fc1.weight.requires_grad
    )
    nn.functional.cross_entropy(cut(images), labels).backward()
    assert (
        cut.blocks[1].mlp.router.weight.grad.abs().sum() > 0
        and cut.blocks[1].mlp.experts.fc1.weight.grad is not None
    )
    mlp = sum(p.numel() for p in model.blocks[0].mlp.shared.parameters())
    rows = 0 if semantics == "zero_update" else 2 * 2 * 24
    assert count(model, 28).params_stored - count(cut, 28).params_stored == 4 * mlp + rows
    again = reloaded(model, cut.state_dict())
    assert (
        torch.equal(again.eval()(images), cut.eval()(images))
        and model.blocks[0].mlp.experts.experts == 4
    )


# ---------------------------------------------------------------- scores


def test_calibration_leaves_modes_and_hooks_as_they_were():
    model = constant(top_k=1, capacity_factor=0.5).train()
    model.moe.experts.eval()
    found = scores.calibrate(model, [PROBS.log()])["moe"]
    assert model.training and model.moe.router.training and not model.moe.experts.training
    assert not model.moe._forward_hooks and model.moe.tape is None
    # One slot an expert, ceil(0.5 * 6 / 3): token 0, 1 and 2 are served; the norm of a constant
    # output is value * sqrt(3).
    assert found.sums[0, 0].tolist() == [1, 1, 1] and found.score(
        0, 1, 0
    ).tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert found.score(1, 0, 2).tolist() == pytest.approx([3.0, 300.0, 30000.0])
    with refused("needs images"):
        scores.calibrate(model, [])
    assert not model.moe._forward_hooks and model.training  # after the error, too


def test_random_scores_are_the_generators():
    model = build(moe=moe(experts=4, layers=2))
    first, again = (
        scores.scores(model, "random", generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first) and list(first) == [
        "blocks.0.mlp",
        "blocks.1.mlp",
    ]
    assert not torch.equal(first["blocks.0.mlp"], first["blocks.1.mlp"])


def test_what_cannot_be_scored_is_refused():
    model = constant()
    with refused("no MoELayer"):
        scores.scores(nn.Linear(2, 2), "router_norm")
    with refused("moe has a AllExperts: expert pruning needs a linear router"):
        scores.scores(Layer(AllExperts(3), Experts(3, 3, 2)), "router_norm")
    with refused("unequal hidden width"):
        scores.scores(Layer(TopKRouter(3, 2, 1), Experts(2, 3, [2, 4])), "router_norm")
    with refused(r"has shape \(2, 3\) instead of \(3, 3\) for moe.router.weight"):
        scores.scores(model, "router_change", before={"moe.router.weight": torch.zeros(2, 3)})
    with refused("has no moe.experts.fc1.weight"):
        scores.scores(model, "weight_change", before={"moe.router.weight": torch.zeros(3, 3)})
    with refused("not of this model: moe"):
        scores.scores(model, "load", calibration={"mlp": scores.calibrate(model, [PROBS])["moe"]})
    with refused(r"layers have \[3, 4\] experts"):
        scores.keep_by_score({"a": torch.zeros(3), "b": torch.zeros(4)}, 0.0)
    with refused("must name different experts"):
        dropping.drop_experts(model, {"moe": [1, 1]}, "zero_update")
    for share in (1.0, 1.5, -0.25):
        with refused("at most 3/4"):
            scores.remaining(4, share)
    assert [scores.remaining(4, share) for share in (0.0, 0.25, 0.5, 0.75)] == [4, 3, 2, 1]


# ---------------------------------------------------------------- ensembles


def test_members_share_the_first_blocks_and_are_pruned_within_their_groups():
    plain = build(moe=moe(experts=4, router_std=1.0))
    two, images = ensemble(copy.deepcopy(plain), 2), batch()[0]
    sizes = []
    two.vit.blocks[0].register_forward_hook(lambda *_: sizes.append(0))
    two.vit.blocks[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    two.vit.blocks[1].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    # Tiled before the first MoE layer, not before.
    assert two(images).shape == (6, 5) and sizes == [6, 0, 12]
    name = "vit.blocks.1.mlp"
    for keep, semantics in (([1, 2], "zero_update"), ([1, 2], "reroute"), ([0, 1, 3], "reroute")):
        cut = dropping.drop_experts(copy.deepcopy(two), {name: keep}, semantics)
        with RoutingTape(cut) as tape:
            out = cut(images)
        [routing] = tape.routings()
        members = cut.get_submodule(name).router.group[routing.expert]
        # Tokens of a member reach its group alone.
        assert torch.equal(members, routing.token // (6 * 17))
        assert torch.equal(reloaded(two, cut.state_dict())(images), out)
    with refused("gives a token 1 experts, but 0 would be left in a group"):
        dropping.drop_experts(two, {name: [0, 1]}, "reroute")


def test_a_members_gate_is_the_softmax_over_its_group():
    router = TopKRouter(3, 4, 1, noise=1.0)
    router.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    router.choice_bias[3] = 5.0
    grouped = GroupRouter.of(router, 2).eval()
    x = torch.tensor([[[1.0, 0.0, 2.0]], [[1.0, 0.0, 2.0]]])  # one image for each member
    routing = grouped(x)
    assert routing.probs[0].tolist() == pytest.approx(
        [*torch.tensor([1.0, 0]).softmax(0).tolist(), 0, 0]
    )
    assert routing.probs[1].tolist() == pytest.approx(
        [0, 0, *torch.tensor([2.0, 1]).softmax(0).tolist()]
    )
    # A bias moves the choice within the group, and not out of it.
    assert routing.expert.tolist() == [0, 3]
    assert (
        grouped.weight is router.weight
        and grouped.state_dict().keys() == router.state_dict().keys() | {"group"}
    )
    assert not torch.equal(grouped.train()(x).probs, routing.probs)  # noise
    with refused("3 rows do not split among 2 members"):
        grouped(x[:1].repeat(3, 1, 1))


def test_what_cannot_be_an_ensemble_is_refused():
    checkpointed = build(moe=moe(experts=4))
    checkpointed.set_grad_checkpointing()
    for model, members, says in (
        (build(), 2, "no MoE layer"),
        (checkpointed, 2, "without checkpointing"),
        (build(moe=moe(experts=4, router="priority")), 2, "PriorityRouter"),
        (ensemble(build(moe=moe(experts=4)), 2).vit, 2, "GroupRouter"),
        (build(moe=moe(experts=4)), 0, "valid is 1, 2, 4"),
    ):
        with refused(says):
            ensemble(model, members)


# ---------------------------------------------------------------- competition


def test_competition_in_a_share_of_the_training_steps():
    torch.manual_seed(0)
    layer = CompeteLayer(
        TopKRouter(3, 4, 2, std=1.0, gate="renormalised"), Experts(4, 3, 5), rate=0.5
    )
    x = torch.randn(2, 3, 3)
    losses, outs = [], []
    for _ in range(40):
        with RoutingTape(layer) as tape:
            outs.append(layer(x))
        losses.append(competition_loss(tape[layer]).item())
    assert 8 < sum(loss > 0 for loss in losses) < 32 and sum(loss == 0 for loss in losses) > 8
    rows = x.reshape(-1, 3)
    every = torch.stack(
        [
            nn.functional.gelu(rows @ w1.t() + b1) @ w2.t() + b2
            for w1, b1, w2, b2 in layer.experts.each()
        ],
        dim=1,
    )
    best = every.norm(dim=-1).softmax(-1).topk(2)
    weight = best.values / best.values.sum(-1, keepdim=True)
    won = torch.einsum(
        "tk,tkd->td", weight, every.gather(1, best.indices.unsqueeze(-1).expand(-1, -1, 3))
    )
    at = next(i for i, loss in enumerate(losses) if loss > 0)
    torch.testing.assert_close(outs[at].reshape(-1, 3), won)


def test_competition_settings_and_pruning():
    for router, says in (
        (TopKRouter(3, 4, 1, per_image=True), "per_image=False"),
        (TopKRouter(3, 4, 1, noise=1.0), "noise=1.0"),
    ):
        with refused(says):
            CompeteLayer(router, Experts(4, 3, 5), rate=0.5)
    model = Layer(TopKRouter(3, 4, 1), Experts(4, 3, 5))
    model.moe = CompeteLayer(model.moe.router, model.moe.experts, rate=1.0)
    with refused("moe is a CompeteLayer"):
        dropping.drop_experts(model, {"moe": [0, 1]}, "zero_update")
    dropping.drop_experts(model, {"moe": [0, 1]}, "reroute")
    assert isinstance(model.moe, CompeteLayer) and run(model.train(), PROBS)[1].experts == 2
