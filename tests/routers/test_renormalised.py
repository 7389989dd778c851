"""Renormalised gates of experts that were chosen although they are not likely: value and gradient
against float64, where the probabilities of float32 are 0.

Axis letters: **T** tokens, **E** experts, **K** experts a token.
"""

from __future__ import annotations

import pytest
import torch

from lib.models.compete import CompeteLayer
from lib.models.experts import Experts
from lib.routers import base
from lib.routers.expert_choice import ExpertChoiceRouter
from lib.routers.priority import PriorityRouter
from lib.routers.top_k import TopKRouter

E = 4
# token 0 is ordinary; expert 0 is all that tokens 1 and 2 want: exp(-200) is 0 in float32
LOGITS = torch.tensor([[1.0, 0.5, 0.0, -1.0], [200.0, 3.0, 0.0, -5.0], [150.0, 0.0, -40.0, 1.0]])


def routed(router, logits, dtype=torch.float32):
    """The Routing of one image whose tokens have these logits, and the logits with their gradient
    to come: the router's weight is the identity."""
    router.weight.data = torch.eye(E, dtype=dtype)
    x = logits.to(dtype).unsqueeze(0).requires_grad_(True)
    return router(x), x


def gradient(routing, x, factors):
    """Of the weights, each times its expert's own factor, (T, E)."""
    loss = (routing.weight * factors[routing.token, routing.expert]).sum()
    return torch.autograd.grad(loss, x)[0][0]


def reference(routing, logits, factors):
    """Weights (A,) and gradient in float64: the softmax of the logits over what each token got, or
    for a single expert 1 with the gradient of log p."""
    logits = logits.double().requires_grad_(True)
    weights = []
    for token, expert in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        takers = routing.expert[routing.token == token]
        log_p = logits[token].log_softmax(dim=0)
        single = routing.choice.shape[1] == 1  # one gate is divided by itself, held still
        whole = log_p[expert].detach() if single else log_p[takers].logsumexp(dim=0)
        weights.append((log_p[expert] - whole).exp())
    weights = torch.stack(weights)
    loss = (weights * factors.double()[routing.token, routing.expert]).sum()
    return weights.detach(), torch.autograd.grad(loss, logits)[0]


def biased(top_k):
    """Loss-free balancing that has long preferred the experts that nobody wants."""
    router = TopKRouter(E, E, top_k, gate="renormalised")
    router.choice_bias += torch.tensor([0.0, 2.0, 3.0, 4.0])
    return router


CASES = {
    "bias, one expert": lambda: biased(1),
    "bias, two experts": lambda: biased(2),
    "bias, three experts": lambda: biased(3),
    "priority": lambda: PriorityRouter(E, E, gate="renormalised"),
    "expert choice": lambda: ExpertChoiceRouter(E, E, gate="renormalised"),
    "expert choice, all experts": lambda: ExpertChoiceRouter(
        E, E, choices=2.0, gate="renormalised"
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_chosen_is_weighed_in_logarithms(case):
    # experts that choose take a token that wants them, if there is one
    logits = LOGITS[1:] if "choice" in case else LOGITS
    routing, x = routed(CASES[case](), logits)
    gates = routing.probs[routing.token, routing.expert]
    assert (gates == 0).any()  # the case is one: 0 / 0 where the quotient is taken as it stands
    factors = torch.randn(len(logits), E, generator=torch.Generator().manual_seed(0))
    weights, slope = reference(routing, logits, factors)
    # exp(-55) of a float32 logit difference: 55 roundings of 1.2e-7
    torch.testing.assert_close(routing.weight, weights.float(), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(gradient(routing, x, factors), slope.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [20.0, 60.0, 69.0, 70.0, 85.0, 95.0, 103.0, 110.0, 1e4])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_distance_from_likely_to_lost_has_a_finite_gradient(gap, top_k):
    """Through the bound, the denormal numbers and beyond, with a loss that is steep."""
    logits = torch.tensor([[gap, 1.0, 0.0, 0.5]])
    routing, x = routed(biased(top_k), logits)
    factors = 1e6 * torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    weights, slope = reference(routing, logits, factors)
    torch.testing.assert_close(routing.weight, weights.float(), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(gradient(routing, x, factors), slope.float(), rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_router_of_few_bits_is_no_exception(dtype):
    routing, x = routed(biased(2), LOGITS, dtype)
    assert routing.weight.isfinite().all()
    assert gradient(routing, x, torch.ones(len(LOGITS), E)).isfinite().all()


# not of priority: its tokens compete, and without the lost ones others are chosen
@pytest.mark.parametrize("case", [c for c in CASES if not isinstance(CASES[c](), PriorityRouter)])
def test_likely_rows_keep_their_bits_beside_lost_ones(case, monkeypatch):
    """They are divided as they are, whether or not another row of the batch needs logarithms."""
    router = CASES[case]()
    if isinstance(router, ExpertChoiceRouter):
        router.group = "image"
    logits = torch.randn(5, E, generator=torch.Generator().manual_seed(1))
    factors = torch.randn(5, E, generator=torch.Generator().manual_seed(2))
    plain, x = routed(router, logits)
    slope = gradient(plain, x, factors)
    monkeypatch.setattr(base, "LEAST_SUM", 0.0)
    as_before, x = routed(router, logits)
    assert torch.equal(plain.weight, as_before.weight)
    assert torch.equal(slope, gradient(as_before, x, factors))
    if isinstance(router, TopKRouter):
        monkeypatch.undo()
        mixed, _ = routed(router, torch.cat([logits, LOGITS[1:]]))
        first = mixed.token < 5
        assert torch.equal(mixed.weight[first], plain.weight)


def test_a_competition_under_a_bias_counts_too():
    """The affinities are a softmax of norms, which may be hundreds apart."""
    experts = Experts(2, 3, 4)
    with torch.no_grad():
        experts.fc2.bias[0] = 300.0
        router = TopKRouter(3, 2, 1, gate="renormalised")
        router.choice_bias += torch.tensor([0.0, 5.0])
    layer = CompeteLayer(router, experts, rate=1.0).train()
    x = torch.randn(1, 4, 3, requires_grad=True)
    routing = layer.decide(x)
    assert (routing.expert == 1).all() and torch.equal(routing.weight, torch.ones(4))
    routing.weight.sum().backward()
    assert x.grad.isfinite().all()
