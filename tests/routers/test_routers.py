"""Routing strategies and the losses on them, by hand: two images, three tokens each, two experts.

And the contract that all routers fulfil."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from lib.models.balance import batch_variation, sharpness_loss, variation_loss
from lib.models.experts import Experts
from lib.models.moe import MoELayer, RoutingTape
from lib.routers import ROUTER_CLASSES
from lib.routers.base import Router, assign
from lib.routers.centroid import CentroidRouter
from lib.routers.expert_choice import ExpertChoiceRouter
from lib.routers.forced import ForcedRouter
from lib.routers.manual import ManualRouter, labelled
from lib.routers.priority import PriorityRouter, balanced_match
from lib.routers.soft import SoftRouter
from lib.routers.top_k import TopKRouter
from lib.spec import ROUTERS, MoESpec

# (B=2, N=3, D=2); with the identity as router weight, token x has logits x. Differences: 2, -1, 1 |
# -3, -1, 3.
X = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[0.0, 3.0], [1.0, 2.0], [3.0, 0.0]]])


def p(difference: float) -> float:
    """Probability of expert 0 at a logit difference."""
    return 1 / (1 + math.exp(-difference))


def by_hand(router):
    router.weight.data = torch.eye(2)
    return router.eval()


def pairs(routing):
    return sorted(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))


def test_expert_choice_by_image():
    # c=1: ceil(3/2) = 2 tokens an expert and image. Image 0: expert 0 takes tokens 0, 2; expert 1
    # takes 1 and then 2.
    routing = by_hand(ExpertChoiceRouter(2, 2))(X)
    assert pairs(routing) == [(0, 0), (1, 1), (2, 0), (2, 1), (3, 1), (4, 0), (4, 1), (5, 0)]
    assert routing.load().tolist() == [4, 4]
    assert routing.choice.tolist() == [[0, -1], [1, -1], [0, 1], [1, -1], [1, 0], [0, -1]]
    weight = dict(
        zip(
            pairs(routing),
            routing.weight[torch.argsort(routing.token * 2 + routing.expert)].tolist(),
            strict=True,
        )
    )
    assert weight[0, 0] == pytest.approx(p(2)) and weight[2, 1] == pytest.approx(1 - p(1))


def test_expert_choice_by_batch_leaves_tokens_without_expert():
    # c=2/3 over the batch of 6: 2 tokens each. Expert 0: tokens 5 (3) and 0 (2); expert 1: token 3
    # (-3), then 1 before 4 (tie).
    routing = by_hand(ExpertChoiceRouter(2, 2, choices=2 / 3, group="batch"))(X)
    assert pairs(routing) == [(0, 0), (1, 1), (3, 1), (5, 0)]
    assert (routing.choice[[2, 4]] == -1).all() and routing.token_choice()[0, 2, 0] == -1
    whole = by_hand(ExpertChoiceRouter(2, 2, gate="renormalised"))(X)
    assert torch.zeros(6).index_add(0, whole.token, whole.weight).tolist() == pytest.approx(
        [1.0] * 6
    )


def test_priority_sends_the_refused_on():
    # Capacity 3 each over the batch: experts 0 and 1 are both asked three times, so all first
    # choices stand.
    routing = by_hand(PriorityRouter(2, 2))(X)
    assert routing.choice[:, 0].tolist() == [0, 1, 0, 1, 1, 0] and routing.load().tolist() == [3, 3]
    # All tokens prefer expert 0; the three with the highest probability stay, the others move.
    scores = torch.tensor(
        [[[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3], [0.95, 0.05], [0.55, 0.45]]]
    )
    assert balanced_match(scores).tolist() == [[0, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("size", [60, 61])
@pytest.mark.parametrize("alike", [False, True], ids=["own preferences", "all prefer the same"])
def test_priority_loads_are_exactly_equal_and_stable(alike, size):
    drawn = torch.rand(3, size, 4, generator=torch.Generator().manual_seed(0))
    scores = (torch.tensor([4.0, 3.0, 2.0, 1.0]) + 0.01 * drawn if alike else drawn).softmax(dim=-1)
    place, slots = balanced_match(scores), -(-size // 4)
    for g in range(3):
        assert (
            torch.bincount(place[g], minlength=4).max() == slots
            and sum(torch.bincount(place[g]).tolist()) == size
        )
        # The definition: pairs by falling score, each in effect if its token is free and its expert
        # has room.
        left, room = {}, [slots] * 4
        for flat in scores[g].flatten().argsort(descending=True, stable=True).tolist():
            token, expert = divmod(flat, 4)
            if token not in left and room[expert]:
                left[token] = expert
                room[expert] -= 1
        assert place[g].tolist() == [left[token] for token in range(size)]


def test_priority_needs_no_more_rounds_than_experts(monkeypatch):
    rounds, real = [], torch.nn.functional.one_hot
    monkeypatch.setattr(
        torch.nn.functional, "one_hot", lambda *given: rounds.append(1) or real(*given)
    )
    scores = (
        torch.tensor([4.0, 3.0, 2.0, 1.0]) + torch.linspace(0, 0.01, 4000).view(1, -1, 1)
    ).softmax(dim=-1)
    assert torch.bincount(balanced_match(scores)[0]).tolist() == [1000] * 4 and len(rounds) <= 4


def test_batch_priority_drops_the_least_sure_and_equals_plain_routing_with_room():
    # Factor 2/3: 2 slots each. Expert 0 is asked by tokens 0 (2), 2 (1), 5 (3): token 2 is the
    # least sure.
    router = by_hand(TopKRouter(2, 2, 1, capacity_factor=2 / 3, batch_priority=True))
    # Tokens 1 and 4 tie, the earlier one stays.
    assert pairs(router(X)) == [(0, 0), (1, 1), (3, 1), (5, 0)]
    plain = by_hand(TopKRouter(2, 2, 1, capacity_factor=2 / 3))
    assert pairs(plain(X)) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    roomy, free = (
        by_hand(TopKRouter(2, 2, 2, capacity_factor=4.0, batch_priority=True)),
        by_hand(TopKRouter(2, 2, 2)),
    )
    assert pairs(roomy(X)) == pairs(free(X)) and roomy(X).dropped.sum() == 0


def test_dense_mixture_is_top_k_of_all():
    experts = Experts(2, 2, 3)
    routing = by_hand(TopKRouter(2, 2, 2))(X)
    flat = X.view(6, 2)
    mixed = sum(
        routing.probs[:, e, None]
        * torch.nn.functional.linear(
            experts.act(
                torch.nn.functional.linear(flat, experts.fc1.weight[e], experts.fc1.bias[e])
            ),
            experts.fc2.weight[e],
            experts.fc2.bias[e],
        )
        for e in range(2)
    )
    torch.testing.assert_close(experts(flat, routing), mixed)


def test_manual_routing_follows_labels():
    router = ManualRouter(2, {0: 1, 1: 0, 2: 1})
    with router.given(torch.tensor([2, 1])):
        routing = router(X)
    assert pairs(routing) == [(0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (5, 0)] and routing.per_image
    with pytest.raises(RuntimeError, match="given\\(labels\\)"):
        router(X)
    with (
        pytest.raises(ValueError, match="class 3 is not in the map"),
        router.given(torch.tensor([3, 0])),
    ):
        router(X)
    with pytest.raises(ValueError, match="no expert for class 1"):
        ManualRouter(2, {0: 1, 2: 0})
    with pytest.raises(ValueError, match="experts 0..1"):
        ManualRouter(2, {0: 2})


def test_soft_moe_weights_sum_to_one_and_match_the_plain_form():
    experts = Experts(2, 2, 3)
    router = SoftRouter(2, 2, slots=2, generator=torch.Generator().manual_seed(0))
    layer = MoELayer(router, experts)
    dispatch, combine = router.weights(X)
    torch.testing.assert_close(dispatch.sum(dim=1), torch.ones(2, 4))
    torch.testing.assert_close(combine.sum(dim=2), torch.ones(2, 3))
    slots = torch.einsum("bns,bnd->bsd", dispatch, X)
    done = torch.stack(
        [
            torch.nn.functional.linear(
                experts.act(
                    torch.nn.functional.linear(
                        slots[:, s], experts.fc1.weight[s // 2], experts.fc1.bias[s // 2]
                    )
                ),
                experts.fc2.weight[s // 2],
                experts.fc2.bias[s // 2],
            )
            for s in range(4)
        ],
        dim=1,
    )
    with RoutingTape(torch.nn.Sequential(layer)) as tape:
        torch.testing.assert_close(layer(X), torch.einsum("bns,bsd->bnd", combine, done))
    [routing] = tape.routings()
    torch.testing.assert_close(routing.probs, combine.view(6, 2, 2).sum(-1))


def soft_moe_by_formula(x, phi, scale, experts, slots):
    """2308.00951, section 2, with normalised tokens and slot vectors, step by step."""
    b, n, d = x.shape
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    logits = scale * unit @ torch.nn.functional.normalize(phi.float(), dim=0)
    dispatch, combine = logits.softmax(dim=1), logits.softmax(dim=2)
    rows = (dispatch.transpose(1, 2) @ x).reshape(-1, d)
    expert = torch.arange(experts.experts).repeat_interleave(slots).repeat(b).unsqueeze(1)
    of_slot = torch.nn.functional.one_hot(expert[:, 0], experts.experts).float()
    routing = assign(
        expert, torch.ones(expert.shape), of_slot, torch.zeros_like(of_slot), (len(rows), 1)
    )
    return combine @ experts(rows, routing).view(b, -1, d)


def test_soft_moe_equals_its_formula_in_value_and_gradient():
    draw = torch.Generator().manual_seed(3)
    x, target = torch.randn(3, 5, 4, generator=draw), torch.randn(3, 5, 4, generator=draw)
    layer = MoELayer(
        SoftRouter(4, 3, slots=2, generator=torch.Generator().manual_seed(0)), Experts(3, 4, 6)
    )
    # The one draw of the slot vectors: (D, S), normal with std 1 / sqrt(D).
    drawn = torch.empty(4, 6).normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.router.phi, drawn) and layer.router.scale.item() == 1.0
    given = x.clone().requires_grad_()
    out = layer(given)
    (out * target).sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": given.grad}
    layer.zero_grad()
    given = x.clone().requires_grad_()
    wanted = soft_moe_by_formula(given, layer.router.phi, layer.router.scale, layer.experts, 2)
    (wanted * target).sum().backward()
    assert torch.equal(out, wanted)
    for name, parameter in layer.named_parameters():
        assert torch.equal(found[name], parameter.grad) and parameter.grad.abs().max() > 0, name
    assert torch.equal(found["x"], given.grad)


# ---- the contract


def spec_of(word):
    """The smallest spec of a word, of two experts."""
    return MoESpec(
        router=word,
        experts=2,
        top_k=2 if ROUTERS[word].every_expert else 1,
        groups=((0,), (1,)) if "groups" in ROUTERS[word].needs else None,
        balance="none",
    )


def test_words_and_classes_go_together():
    assert ROUTERS.keys() == ROUTER_CLASSES.keys()


@pytest.mark.parametrize("word", ROUTERS)
def test_a_word_says_what_its_router_is(word):
    spec = spec_of(word)
    router = ROUTER_CLASSES[word].from_spec(spec, 2, torch.Generator().manual_seed(0))
    assert isinstance(router, Router) and router.experts == 2
    assert spec.learns == (sum(p.numel() for p in router.parameters()) > 0)
    with labelled(router, torch.tensor([0, 1])):
        routing = router(X)
    assert routing.per_image == spec.per_image
    served = {
        image: set(routing.expert[routing.token // 3 == image].tolist()) for image in range(2)
    }
    touched = router.experts_per_image()
    assert touched is None or all(len(experts) == touched for experts in served.values())
    if not router.mixes_tokens:
        assert router.expert_rows(tokens=6, images=2) == len(routing.token)
    assert router.stored_numbers() >= sum(p.numel() for p in router.parameters())
    assert (router.decision_macs(tokens=6, images=2) > 0) == spec.learns


@pytest.mark.parametrize("word", [word for word, router in ROUTERS.items() if router.learns])
def test_reset_draws_what_the_spec_draws(word):
    router = ROUTER_CLASSES[word].from_spec(spec_of(word), 2, torch.Generator().manual_seed(0))
    first = {name: p.detach().clone() for name, p in router.named_parameters()}
    router.reset(torch.Generator().manual_seed(1))
    assert any(not torch.equal(p, first[name]) for name, p in router.named_parameters())
    router.reset(torch.Generator().manual_seed(0))
    assert all(torch.equal(p, first[name]) for name, p in router.named_parameters())


def test_a_router_of_unknown_cost_cannot_exist():
    class Costless(Router):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match="decision_macs.*expert_rows.*experts_per_image"):
        Costless(2)
    with pytest.raises(TypeError, match="ForcedRouter is not made from a MoESpec"):
        ForcedRouter.from_spec(MoESpec(), 2, None)


def test_what_a_router_takes_over():
    top_k, choice = TopKRouter(2, 2, 1), ExpertChoiceRouter(2, 2)
    parent = {"weight": torch.eye(2), "choice_bias": torch.ones(2), "alive": torch.ones(2)}
    assert set(top_k.taken_over(parent)) == {"weight", "choice_bias"}
    assert set(choice.taken_over(parent)) == {"weight"}
    assert torch.equal(choice.taken_over(parent)["weight"], torch.eye(2))
    assert torch.equal(top_k.taken_over({})["weight"], top_k.weight)


def test_centres_are_weights_although_nothing_trains_them():
    router = CentroidRouter(torch.eye(3, 4), torch.zeros(3))
    assert not list(router.parameters()) and router.stored_numbers() == 3 * 4 + 3
    assert router.decision_macs(tokens=10, images=2) == 10 * 3 * 4


def test_nothing_outside_the_room_asks_for_a_routers_word():
    root = Path(__file__).resolve().parents[2] / "lib"
    # `rules.router` is a word of ExtractSpec, whose routers are made by the extraction itself.
    asks = re.compile(r"(?<!rules)\.router\s*(==|!=|in\b|not in\b)")
    assert asks.search('if spec.moe.router not in ("all", "manual"):')
    wrong = [
        f"{file.relative_to(root)}: {line.strip()}"
        for file in root.rglob("*.py")
        if file.parent.name not in ("routers", "spec")
        for line in file.read_text().splitlines()
        if asks.search(line)
    ]
    assert not wrong


def routing_of(probs):
    b, n, e = probs.shape
    flat = probs.reshape(b * n, e)
    return assign(flat.argmax(-1, keepdim=True), flat.amax(-1, keepdim=True), flat, flat, (b, n))


def test_sharpness_by_hand():
    one_hot = torch.nn.functional.one_hot(torch.arange(8) % 4, 4).float().view(2, 4, 4)
    # E / (E - 1)
    assert sharpness_loss(routing_of(one_hot), guard=0.0).item() == pytest.approx(4 / 3)
    uniform = torch.full((2, 4, 4), 0.25)
    # 1 / (E guard)
    assert sharpness_loss(routing_of(uniform), guard=1e-2).item() == pytest.approx(25.0)


def test_variation_by_hand_and_its_bound():
    # Two images of three tokens: all tokens of image 0 with expert 0, all of image 1 with expert 1:
    # s_e is 3 and 0.
    apart = torch.stack([torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)])
    # variance 2.25 over mean 1.5
    assert batch_variation(routing_of(apart)).item() == pytest.approx(3 * (1 - 1 / 2))
    assert variation_loss(routing_of(apart), guard=0.0).item() == pytest.approx(1.5 / 2.25)
    assert variation_loss(routing_of(apart), guard=0.0, deviation=True).item() == pytest.approx(1.0)
    alike = torch.full((2, 3, 2), 0.5)
    assert batch_variation(routing_of(alike)).item() == pytest.approx(0.0)
    assert variation_loss(routing_of(alike), guard=0.5).item() == pytest.approx(3.0)
    # The report's shape: 144 tokens, 4 experts, each image wholly with one expert.
    whole = (
        torch.nn.functional.one_hot(torch.arange(8) % 4, 4).float().unsqueeze(1).expand(8, 144, 4)
    )
    assert batch_variation(routing_of(whole)).item() == pytest.approx(108.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExpertChoiceRouter(2, 2, group="row"),
        lambda: ExpertChoiceRouter(2, 2, choices=0.0),
        lambda: ExpertChoiceRouter(2, 2, choices=3.0),
        lambda: PriorityRouter(2, 2, group="row"),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="'image' or within the 'batch'|above 0 and at most"):
        make()
