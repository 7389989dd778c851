"""Rows of experts against the einsum reference: both ways to train, bfloat16, and what must not
change under compilation, checkpointing, copies, and a second derivative."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reference
import torch
from torch import nn

from lib.models import experts as experts_module
from lib.models import grouped
from lib.models.experts import Experts
from lib.models.moe import MoELayer
from lib.routers.base import assign
from lib.routers.top_k import TopKRouter

T, D, H, E = 24, 6, 7, 4
ALIGNED = 8, 16  # D and H of which grouped products are made


def drawn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choices(case):
    """(T, K) experts of each token."""
    if case == "K = E":
        return torch.arange(E).expand(T, E)
    if case == "all on one":
        return torch.full((T, 1), 2)
    if case == "an empty expert":
        return torch.arange(T).unsqueeze(1) % (E - 1)
    if case == "one token":
        return torch.tensor([[3, 1]])
    first = torch.arange(T).unsqueeze(1) % E
    return first if case == "K = 1" else torch.cat([first, (first + 1 + first % 2) % E], dim=1)


CASES = ("K = 1", "K = 2", "K = E", "all on one", "an empty expert", "one token")


def setting(case, dtype=torch.float64, sizes=(D, H)):
    """Experts of D and H, tokens, weights of assignments and a Routing that hands them on."""
    torch.manual_seed(0)
    choice = choices(case)
    tokens, top_k = choice.shape
    experts = Experts(E, *sizes).to(dtype)
    x = drawn(tokens, sizes[0], seed=1, dtype=dtype).requires_grad_()
    weight = drawn(tokens, top_k, seed=2, dtype=dtype).abs().requires_grad_()
    blank = torch.zeros(tokens, E)
    routing = assign(choice, weight, blank, blank, (1, tokens))
    dense = torch.zeros(tokens, E, dtype=dtype).scatter(1, choice, weight)
    return experts, x, weight, routing, dense


def stacks(experts):
    return [experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias]


WAYS = ["together", "one by one"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Both ways of a training step: hidden activations of all rows together, or of each expert."""
    choose(request.param, monkeypatch)


@pytest.fixture(params=[*WAYS, "in groups"])
def any_way(request, monkeypatch):
    """The same, and that of a graphics card, whose products know no float64: those of all experts
    in one call."""
    choose(request.param, monkeypatch)


def choose(way, monkeypatch):
    if way == "one by one":
        monkeypatch.setattr(experts_module, "TOGETHER_BYTES", -1)
    if way == "in groups":
        monkeypatch.setattr(grouped, "available", lambda rows, *weights: True)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_the_reference(case, way):
    experts, x, weight, routing, dense = setting(case)
    expected = reference.moe(x.unsqueeze(0), dense, *stacks(experts))[0]
    got = experts(x, routing)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    probe, wrt = drawn(*got.shape, seed=3), [x, weight, *stacks(experts)]
    torch.testing.assert_close(
        torch.autograd.grad((got * probe).sum(), wrt),
        torch.autograd.grad((expected * probe).sum(), wrt),
        rtol=1e-9,
        atol=1e-10,
    )
    with torch.no_grad():
        torch.testing.assert_close(experts(x, routing), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_grouped_products_equal_the_reference(case, monkeypatch):
    """In value, in gradient, and in the gradient of a gradient."""
    experts, x, weight, routing, dense = setting(case, torch.float32, ALIGNED)
    wrt, probe = [x, weight, *stacks(experts)], drawn(*x.shape, seed=3, dtype=torch.float32)
    expected = reference.moe(x.unsqueeze(0), dense, *stacks(experts))[0]
    choose("in groups", monkeypatch)
    got = experts(x, routing)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    def derivatives(out):
        first = torch.autograd.grad((out * probe).sum(), wrt, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), wrt)

    torch.testing.assert_close(derivatives(got), derivatives(expected), rtol=1e-4, atol=1e-5)


def test_grouped_products_are_for_aligned_bfloat16_on_a_card():
    rows, weight = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(2, 16, 8)
    assert not grouped.available(rows, weight)
    on_card = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
        assert grouped.available(on_card, weight)
        assert not grouped.available(on_card, weight, torch.empty(2, 8, 12))  # not aligned
        assert not grouped.available(on_card, torch.empty(16, 8))  # unequal widths
        on_card.dtype = torch.float32
        assert not grouped.available(on_card, weight)
        on_card.dtype = torch.bfloat16
        patch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
        assert not grouped.available(on_card, weight)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_near_the_reference(case, any_way):
    """Tolerance: 2 % of the largest value and 4 % of the largest gradient, a few steps of
    bfloat16 (0.4 %)."""
    experts, x, weight, routing, dense = setting(case, torch.bfloat16, ALIGNED)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, *stacks(experts))]
    dense = torch.zeros(dense.shape, dtype=torch.float64).scatter(1, choices(case), exact[1])
    expected = reference.moe(exact[0].unsqueeze(0), dense, *exact[2:])[0]
    got, probe = experts(x, routing), drawn(*x.shape, seed=3)
    with torch.no_grad():
        still = experts(x, routing)
    for value in (got, still):
        assert value.dtype == torch.bfloat16
        assert (value - expected).abs().max() < 0.02 * expected.abs().max()
    grads = torch.autograd.grad((got * probe).sum(), [x, weight, *stacks(experts)])
    for a, b in zip(grads, torch.autograd.grad((expected * probe).sum(), exact), strict=True):
        assert (a - b).abs().max() <= 0.04 * b.abs().max()


@pytest.mark.parametrize("case", ["K = 1", "K = 2", "an empty expert"])
def test_autocast_gives_gradients_of_the_parameters_type(case, any_way):
    experts, x, weight, routing, dense = setting(case, torch.float32, ALIGNED)
    expected = reference.moe(x.unsqueeze(0), dense, *stacks(experts))[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = experts(x, routing)
    wrt, probe = [x, weight, *stacks(experts)], drawn(*x.shape, seed=3, dtype=torch.float32)
    grads = torch.autograd.grad((got * probe).sum(), wrt)
    for a, b in zip(grads, torch.autograd.grad((expected * probe).sum(), wrt), strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() <= 0.04 * b.abs().max()


@pytest.mark.parametrize("case", ["K = 1", "K = 2", "an empty expert"])
def test_second_derivatives(case, way):
    experts, x, weight, routing, _ = setting(case)
    experts.act = nn.Tanh()

    def run(x, weight, w1):
        flat = weight.t().reshape(-1)
        state = {"fc1.weight": w1}
        args = (x, replace(routing, weight=flat))
        return torch.func.functional_call(experts, state, args)

    inputs = (x, weight, experts.fc1.weight.detach().requires_grad_())
    # along random directions: each entry by itself takes two minutes
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_frozen_parameters_get_no_gradient(way):
    experts, x, _, routing, _ = setting("K = 2")
    experts.fc1.requires_grad_(False)
    experts.fc2.bias.requires_grad_(False)
    experts(x.detach(), routing).sum().backward()
    assert experts.fc2.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in (*experts.fc1.parameters(), experts.fc2.bias))


@pytest.mark.parametrize("top_k", [1, 2])
def test_compiled_copied_and_checkpointed_alike(top_k):
    torch.manual_seed(0)
    layer = MoELayer(TopKRouter(D, E, top_k, std=1.0), Experts(E, D, H))
    x = drawn(3, 8, D, seed=1, dtype=torch.float32)

    def grads(module, run):
        module.zero_grad()
        out = run(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in module.parameters())]

    plain, twin = grads(layer, layer), copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(grads(layer, compiled), plain)
    torch._dynamo.reset()
    torch.testing.assert_close(grads(twin, twin), plain, rtol=0, atol=0)
    again = torch.utils.checkpoint.checkpoint
    checkpointed = grads(layer, lambda x: again(layer, x, use_reentrant=False))
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


def test_deterministic_algorithms_are_all_there_is(any_way):
    torch.use_deterministic_algorithms(True)
    try:
        experts, x, _, routing, _ = setting("K = 2", torch.float32, ALIGNED)
        experts(x, routing).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad.abs().max() > 0
