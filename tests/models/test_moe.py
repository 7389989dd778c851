"""The MoE layer against the einsum reference and hand-computed cases; routers, gates, capacity,
losses."""

from dataclasses import replace

import pytest
import reference
import torch
from torch import nn

from lib.models.balance import switch_loss, update_choice_bias, z_loss
from lib.models.experts import Experts
from lib.models.moe import MoELayer
from lib.routers.all import AllExperts
from lib.routers.base import assign, capacity
from lib.routers.top_k import TopKRouter

B, N, D, H, E = 3, 5, 6, 7, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(experts=E, top_k=1, shared=False, seed=0, **router):
    """A float64 layer with distinct experts and a router whose decisions are far apart."""
    torch.manual_seed(seed)
    shared_mlp = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) if shared else None
    return MoELayer(
        TopKRouter(D, experts, top_k, std=1.0, **router), Experts(experts, D, H), shared_mlp
    ).double()


def stacks(experts):
    return experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias


CASES = {
    "top1": {},
    "top2": {"top_k": 2},
    "all": {"top_k": E},
    "one-expert": {"experts": 1},
    "image": {"per_image": True},
    "image-top2": {"per_image": True, "top_k": 2},
    "renormalised": {"gate": "renormalised"},
    "renormalised-top3": {"gate": "renormalised", "top_k": 3},
    "image-renormalised": {"per_image": True, "gate": "renormalised"},
    "capacity": {"capacity_factor": 0.6},
    "capacity-top2": {"capacity_factor": 0.5, "top_k": 2},
    "shared": {"shared": True},
    "shared-image-top2": {"shared": True, "per_image": True, "top_k": 2},
}


@pytest.mark.parametrize("shape", [(B, N), (1, 1), (4, 1), (1, 9)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference_in_value_and_gradient(case, shape):
    moe = layer(**case)
    x = torch.randn(*shape, D, dtype=torch.float64, generator=generator(1), requires_grad=True)
    probe = torch.randn(*shape, D, dtype=torch.float64, generator=generator(2))
    options = {k: v for k, v in case.items() if k in ("per_image", "gate", "capacity_factor")}
    # The router computes in float32 whatever comes in, so the reference gets the same rounded
    # gates.
    weights = reference.gates(
        x.float(), moe.router.weight.float(), case.get("top_k", 1), **options
    ).double()
    expected = reference.moe(x, weights, *stacks(moe.experts))
    if moe.shared is not None:
        expected = expected + moe.shared(x)
    got = moe(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), expected, rtol=1e-5, atol=1e-6)
    wrt = [x, *moe.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * probe).sum(), wrt),
        torch.autograd.grad((expected * probe).sum(), wrt),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [0, 2])
def test_all_tokens_on_one_expert(target):
    """The other experts are empty: the values hold, and their gradients are zeros."""
    moe = layer()
    moe.router.choice_bias[target] = 10.0
    x = torch.randn(B, N, D, dtype=torch.float64, generator=generator(1), requires_grad=True)
    weights = torch.softmax(x.float() @ moe.router.weight.float().t(), -1).view(-1, E).double()
    only = torch.zeros_like(weights)
    only[:, target] = weights[:, target]
    got, expected = moe(x), reference.moe(x, only, *stacks(moe.experts))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    for a, b in zip(
        torch.autograd.grad(got.sum(), [x, *moe.parameters()], retain_graph=True),
        torch.autograd.grad(expected.sum(), [x, *moe.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    for stack in stacks(moe.experts):
        idle = [e for e in range(E) if e != target]
        assert stack.grad[idle].abs().max() == 0 and stack.grad[target].abs().max() > 0


WIDTHS = (9, 3, 1, 7)


def padded(experts):
    """The four stacks of experts of unequal width for the reference: filled up with neurons that do
    nothing."""
    most = max(experts.widths)
    parts = [
        (
            nn.functional.pad(w1, (0, 0, 0, most - len(b1))),
            nn.functional.pad(b1, (0, most - len(b1))),
            nn.functional.pad(w2, (0, most - len(b1))),
            b2,
        )
        for w1, b1, w2, b2 in experts.each()
    ]
    return [torch.stack(group) for group in zip(*parts, strict=True)]


@pytest.mark.parametrize("shape", [(B, N), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "case",
    [{}, {"top_k": E}, {"top_k": 2, "gate": "renormalised"}, {"capacity_factor": 0.6}, {"only": 2}],
    ids=["top1", "all", "top2", "capacity", "one-for-all"],
)
def test_unequal_widths_equal_reference(case, shape):
    only, case = case.get("only"), {k: v for k, v in case.items() if k != "only"}
    moe = layer(**case)
    moe.experts = Experts(E, D, WIDTHS).double()
    if only is not None:
        moe.router.choice_bias[only] = 10.0
    x = torch.randn(*shape, D, dtype=torch.float64, generator=generator(1), requires_grad=True)
    probe = torch.randn(*shape, D, dtype=torch.float64, generator=generator(2))
    options = {k: v for k, v in case.items() if k != "top_k"}
    if only is None:
        weights = reference.gates(
            x.float(), moe.router.weight.float(), case.get("top_k", 1), **options
        ).double()
    else:
        probs = torch.softmax(x.float() @ moe.router.weight.float().t(), -1).view(-1, E).double()
        weights = probs * torch.eye(E)[only]
    got, expected = moe(x), reference.moe(x, weights, *padded(moe.experts))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # rows are written in place
        torch.testing.assert_close(moe(x), expected, rtol=1e-5, atol=1e-6)
    wrt = [x, *moe.parameters()]
    grads = torch.autograd.grad((got * probe).sum(), wrt)
    for a, b in zip(grads, torch.autograd.grad((expected * probe).sum(), wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if only is not None:  # idle experts have zero gradients, not none
        used = [bool(g.any()) for g in grads[2].split(WIDTHS)]
        assert grads[2].shape == (sum(WIDTHS), D) and used == [e == only for e in range(E)]


def test_unequal_widths_in_bf16():
    moe = layer(top_k=2).float()
    moe.experts = Experts(E, D, WIDTHS)
    x = torch.randn(B, N, D, generator=generator(1))
    plain = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = moe(x)
        with torch.no_grad():
            still = moe(x)
    assert (half - plain).abs().max() < 0.02 * plain.abs().max()
    assert (still - plain).abs().max() < 0.02 * plain.abs().max()


def test_experts_of_parts():
    """Given weights come back; equal widths are stacked, unequal ones flat, each drawn like its own
    nn.Linear."""
    drawn = Experts(E, D, WIDTHS)
    assert drawn.widths == drawn.hidden == WIDTHS and drawn.rows.tolist() == list(WIDTHS)
    assert {n: tuple(p.shape) for n, p in drawn.named_parameters()} == {
        "fc1.weight": (20, D),
        "fc1.bias": (20,),
        "fc2.weight": (20, D),
        "fc2.bias": (E, D),
    }
    parts = list(drawn.each())
    for h, (_, _, w2, b2) in zip(WIDTHS, parts, strict=True):
        bound = h**-0.5
        assert 0.5 * bound < w2.abs().max() <= bound and b2.abs().max() <= bound
    again = Experts.of(parts, nn.ReLU())
    assert isinstance(again.act, nn.ReLU) and again.fc1.weight is not drawn.fc1.weight
    for a, b in zip(again.parameters(), drawn.parameters(), strict=True):
        assert torch.equal(a, b)
    equal = Experts.of([parts[0], parts[0]])
    assert equal.hidden == 9 and equal.fc2.weight.shape == (2, D, 9) and not list(equal.buffers())
    assert Experts(2, D, (H, H)).hidden == H
    drawn.reset(generator())
    assert not drawn.fc2.bias.any()
    assert 0.01 < drawn.fc1.weight.std() < 0.03 and drawn.fc2.weight.abs().max() < 0.1


def test_state_of_unequal_widths():
    saved, fresh = Experts(E, D, WIDTHS), Experts(E, D, WIDTHS)
    state = saved.state_dict()
    fresh.load_state_dict(state)
    for a, b in zip(fresh.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b)
    assert Experts.widths_in(state) == WIDTHS
    assert Experts.widths_in(Experts(2, D, H).state_dict()) == (H, H)
    assert Experts.widths_in(nn.ModuleDict({"fc1": nn.Linear(D, H)}).state_dict()) is None
    # All have 20 rows, as the state has: the shapes alone would not tell them apart.
    for other in (Experts(E, D, WIDTHS[::-1]), Experts(E, D, 5), Experts(2, D, (4, 16))):
        inside = {f"mlp.{name}": tensor for name, tensor in state.items()}
        with pytest.raises(
            ValueError,
            match=r"mlp: the state has 4 experts of widths \(9, 3, 1, 7\), the layer .*fit_shapes",
        ):
            nn.ModuleDict({"mlp": other}).load_state_dict(inside)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Experts(2, D, (3, 0)),
            r"hidden=\(3, 0\) leaves expert 1 without a neuron: pruning to nothing",
        ),
        (lambda: Experts(2, D, 0), "leaves expert 0 without a neuron"),
        (lambda: Experts(3, D, (3, 4)), "names 2 widths for experts=3"),
        (lambda: Experts.of([]), "at least one expert"),
        (
            lambda: Experts.of(
                [next(Experts(1, D, 3).each())[:2] + next(Experts(1, D, 4).each())[2:]]
            ),
            r"expert 0 has w1 \(3, 6\), b1 \(3,\), w2 \(6, 4\)",
        ),
    ],
)
def test_widths_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("hidden", [H, WIDTHS], ids=["equal", "unequal"])
def test_no_tokens(hidden):
    moe = layer()
    moe.experts = Experts(E, D, hidden).double()
    out = moe(torch.zeros(0, N, D, dtype=torch.float64))
    out.sum().backward()
    assert out.shape == (0, N, D)
    for p in moe.experts.parameters():
        assert p.grad is not None and not p.grad.any()


@pytest.mark.parametrize("case", ["top1", "top2", "image", "capacity", "shared"])
def test_bf16_autocast(case):
    """Tolerance: 2 % of the largest value, a few steps of bfloat16 (8 bits, 0.4 %) through two
    layers. Routing is exact."""
    moe = layer(**CASES[case]).float()
    x = torch.randn(B, N, D, generator=generator(1))
    plain = moe(x)
    plain.square().sum().backward()
    full = [p.grad.clone() for p in moe.parameters()]
    moe.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = moe(x)
        inside = moe.router(x).logits
        with torch.no_grad():  # another order of the same products
            still = moe(x)
    assert torch.equal(inside, moe.router(x).logits)
    assert (still - plain).abs().max() < 0.02 * plain.abs().max()
    half.float().square().sum().backward()
    assert half.dtype == torch.bfloat16
    assert (half - plain).abs().max() < 0.02 * plain.abs().max()
    for p, g in zip(moe.parameters(), full, strict=True):
        assert p.grad.dtype == torch.float32 and (p.grad - g).abs().max() < 0.04 * g.abs().max()


def test_routing_by_hand():
    """Two images of three tokens of width two (T = 6), two experts; router = identity, so logits
    are the tokens."""
    router = TopKRouter(2, 2, 1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    x = torch.log(
        torch.tensor([[[3.0, 1.0], [1.0, 4.0], [1.0, 1.5]], [[4.0, 1.0], [9.0, 1.0], [1.0, 2.0]]])
    )
    probs = torch.tensor(
        [[0.75, 0.25], [0.2, 0.8], [0.4, 0.6], [0.8, 0.2], [0.9, 0.1], [1 / 3, 2 / 3]]
    )
    got = router(x)
    torch.testing.assert_close(got.probs, probs)
    assert got.token.tolist() == [0, 1, 2, 3, 4, 5] and got.expert.tolist() == [0, 1, 1, 0, 0, 1]
    torch.testing.assert_close(got.weight, torch.tensor([0.75, 0.8, 0.6, 0.8, 0.9, 2 / 3]))
    assert got.load().tolist() == [3, 3] and got.shape == (2, 3) and not got.per_image
    assert got.token_choice().tolist() == [[[0], [1], [1]], [[0], [0], [1]]]

    router.per_image = True  # tokens 0 and 3 are the class tokens
    got = router(x)
    torch.testing.assert_close(got.probs, probs[[0, 3]])
    assert got.per_image and got.expert.tolist() == [0] * 6
    assert got.token_choice().tolist() == [[[0]] * 3] * 2
    torch.testing.assert_close(got.weight, torch.tensor([0.75] * 3 + [0.8] * 3))
    router.pool = "mean"  # mean of log tokens: sums of logits over three
    torch.testing.assert_close(router(x).logits, x.mean(1))

    router.per_image, router.top_k = False, 2  # first choices of all tokens come before second ones
    got = router(x)
    assert got.expert.tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert got.token.tolist() == [*range(6)] * 2


def test_capacity_by_hand():
    assert capacity(1.0, 1, 6, 2) == 3
    assert capacity(1.0, 1, 7, 2) == 4
    assert capacity(0.5, 2, 6, 4) == 2
    assert capacity(0.01, 1, 6, 2) == 1
    # products that lie a rounding above a whole number
    assert (capacity(1.1, 1, 100, 2), capacity(1.1, 1, 100, 10), capacity(1.05, 3, 40, 2)) == (
        55,
        11,
        63,
    )
    # T = 4, K = 2, E = 2; factor 0.5: two slots each.
    choice = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    probs = torch.full((4, 2), 0.5)
    got = assign(choice, torch.arange(8.0).view(4, 2), probs, probs, (1, 4), capacity_factor=0.5)
    # Expert 0 serves the first choices of tokens 0 and 1; expert 1 the first of token 3, then the
    # second of token 0.
    assert list(zip(got.token.tolist(), got.expert.tolist(), got.weight.tolist(), strict=True)) == [
        (0, 0, 0.0),
        (1, 0, 2.0),
        (3, 1, 6.0),
        (0, 1, 1.0),
    ]
    assert got.dropped.tolist() == [0, 1, 2, 1] and got.choice is choice
    assert got.load().tolist() == [2, 2]


def test_a_token_without_experts_gets_zero():
    experts = Experts(2, D, H)
    choice = torch.zeros(4, 1, dtype=torch.long)
    probs = torch.full((4, 2), 0.5)
    routing = assign(choice, torch.ones(4, 1), probs, probs, (1, 4), capacity_factor=1.0)
    out = experts(torch.randn(4, D), routing)
    assert out[:2].abs().min() > 0 and not out[2:].any()


def test_sums_in_any_order_of_assignments():
    """Hand-made routing, tokens in no order and with unequal numbers of experts, as expert choice
    makes it."""
    moe = layer()
    token, expert = torch.tensor([3, 0, 3, 1, 3, 0]), torch.tensor([2, 1, 0, 3, 1, 2])
    weight = torch.arange(1.0, 7.0, dtype=torch.float64)
    x = torch.randn(1, 4, D, dtype=torch.float64, generator=generator(1))
    routing = replace(moe.router(x), token=token, expert=expert, weight=weight)
    dense = torch.zeros(4, E, dtype=torch.float64).index_put((token, expert), weight)
    torch.testing.assert_close(
        moe.experts(x[0], routing), reference.moe(x, dense, *stacks(moe.experts))[0]
    )
    # As many assignments as a K of 1.5 per token, then K = 2 with tokens in mixed order.
    pairs = torch.tensor([1, 1, 0, 3, 0, 2])
    for token in (pairs, torch.tensor([2, 0, 3, 1, 1, 3, 0, 2])):
        expert = torch.tensor([0, 1, 2, 3, 3, 0, 1, 1])[: len(token)]
        weight = torch.ones(len(token), dtype=torch.float64)
        routing = replace(routing, token=token, expert=expert, weight=weight)
        dense = torch.zeros(4, E, dtype=torch.float64).index_put(
            (token, expert), weight, accumulate=True
        )
        torch.testing.assert_close(
            moe.experts(x[0], routing), reference.moe(x, dense, *stacks(moe.experts))[0]
        )


def test_noise_only_in_training():
    moe = layer(noise=50.0).float()
    x = torch.randn(B, N, D, generator=generator(1))
    torch.manual_seed(3)
    first, second = moe.router(x), moe.router(x)
    assert not torch.equal(first.probs, second.probs) and torch.equal(first.logits, second.logits)
    moe.eval()
    torch.testing.assert_close(
        moe.router(x).probs, moe.router(x).logits.softmax(-1), rtol=0, atol=0
    )


@pytest.mark.parametrize("per_image", [False, True])
def test_renormalised_gate_at_top1_trains_the_router(per_image):
    moe = layer(gate="renormalised", per_image=per_image)
    x = torch.randn(B, N, D, dtype=torch.float64, generator=generator(1))
    routing = moe.router(x)
    assert torch.equal(routing.weight, torch.ones_like(routing.weight))
    (moe(x) * torch.randn(x.shape, dtype=x.dtype, generator=generator(2))).sum().backward()
    assert moe.router.weight.grad.abs().max() > 1e-3


def test_choice_bias_moves_the_choice_and_not_the_weights():
    moe = layer(per_image=False)
    x = torch.randn(B, N, D, dtype=torch.float64, generator=generator(1))
    before = moe.router(x)
    moe.router.choice_bias[1] = 5.0
    after = moe.router(x)
    assert set(after.expert.tolist()) == {1} and len(set(before.expert.tolist())) > 1
    assert torch.equal(after.probs, before.probs) and torch.equal(after.weight, before.probs[:, 1])


def test_all_experts_is_a_sum_or_a_mean():
    experts = Experts(3, D, H)
    x = torch.randn(B, N, D)
    each = [
        nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, w1, b1)), w2, b2)
        for w1, b1, w2, b2 in zip(*stacks(experts), strict=True)
    ]
    torch.testing.assert_close(MoELayer(AllExperts(3), experts)(x), sum(each))
    torch.testing.assert_close(MoELayer(AllExperts(3, "renormalised"), experts)(x), sum(each) / 3)


def test_losses_by_hand():
    probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.8, 0.2]], requires_grad=True)
    logits = probs.detach().log().requires_grad_()
    routing = assign(torch.tensor([[0], [0], [1], [0]]), torch.ones(4, 1), probs, logits, (1, 4))
    loss = switch_loss(routing)  # shares 3/4 and 1/4; mean probabilities 0.55 and 0.45
    torch.testing.assert_close(loss, torch.tensor(2 * (0.75 * 0.55 + 0.25 * 0.45)))
    loss.backward()
    torch.testing.assert_close(
        probs.grad, torch.tensor([[2 * 0.75 / 4, 2 * 0.25 / 4]]).expand(4, 2)
    )
    assert z_loss(routing).abs() < 1e-12  # logs of probabilities are normalised already
    router = TopKRouter(2, 2, 1)
    update_choice_bias(router, routing, 0.1)
    torch.testing.assert_close(router.choice_bias, torch.tensor([-0.1, 0.1]))


def test_adamw_on_an_idle_expert():
    """Zero gradient, not none: AdamW decays its weights and applies momentum, as for any weight of
    a dense layer."""
    moe = layer().float()
    moe.router.choice_bias[0] = 10.0
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1, weight_decay=0.5)
    before = moe.experts.fc1.weight.detach().clone()
    moe(torch.randn(B, N, D)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(moe.experts.fc1.weight[1:], before[1:] * (1 - 0.1 * 0.5))
    moved = moe.experts.fc1.weight.detach()[0] - before[0] * (1 - 0.1 * 0.5)
    assert moved.abs().max() > 0.05
    # Now expert 0 is idle, with momentum.
    moe.router.choice_bias.copy_(torch.tensor([0.0, 10, 0, 0]))
    still = moe.experts.fc1.weight.detach()[0].clone()
    optimizer.zero_grad()
    moe(torch.randn(B, N, D)).sum().backward()
    assert not moe.experts.fc1.weight.grad[0].any()
    optimizer.step()
    assert (moe.experts.fc1.weight[0] - still * (1 - 0.1 * 0.5)).abs().max() > 0.01
