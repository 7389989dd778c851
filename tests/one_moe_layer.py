"""Models of one MoE layer, for the tests of expert pruning.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **H** hidden width,
**E** experts, **K** experts per token.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lib.models.experts import Experts
from lib.models.moe import MoELayer, RoutingTape
from lib.pruning.steps import DropStep
from lib.routers.top_k import TopKRouter
from lib.spec import DropSpec

# Two images of three tokens; the router's weight is the identity, so the probabilities of a token
# are these.
PROBS = torch.tensor(
    [
        [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]],
        [[0.1, 0.6, 0.3], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]],
    ]
)


class Layer(nn.Module):
    """One MoE layer on tokens (B, N, D)."""

    def __init__(self, router, experts, **options):
        super().__init__()
        self.moe = MoELayer(router, experts, **options)

    def forward(self, x):
        return self.moe(x)


def constant(top_k=2, values=(1.0, 10.0, 100.0), **router):
    """Expert e gives values[e] whatever it sees."""
    experts = Experts(len(values), 3, 2)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()
        experts.fc2.bias.copy_(torch.tensor(values).unsqueeze(1).expand(-1, 3))
    identity = TopKRouter(3, 3, top_k, **router)
    identity.weight.data = torch.eye(3)
    return Layer(identity, experts).eval()


def run(model, x):
    """(T,) outputs of constant experts, and the routing."""
    with RoutingTape(model) as tape:
        out = model(x)
    return out.reshape(-1, out.shape[-1])[:, 0], tape[model.get_submodule("moe")]


def reloaded(model, state):
    """A copy of the undropped model with the structure and the values of another one."""
    again = DropStep(DropSpec()).fit(copy.deepcopy(model), state)
    again.load_state_dict(state)
    return again


def refused(says):
    return pytest.raises(ValueError, match=says)


D, H, E, K, B, N = 4, 6, 3, 2, 2, 5


class Toy(nn.Module):
    """Images (B, D, 1, N), whose pixels are tokens, through one MoE layer."""

    def __init__(self, experts=E, top_k=K, **router):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.moe = MoELayer(
            TopKRouter(D, experts, top_k, std=1.0, generator=generator, **router),
            Experts(experts, D, H),
        )

    def forward(self, images):
        return self.moe(images.flatten(2).transpose(1, 2))


def toy_images():
    """(B, D, 1, N), always the same."""
    return torch.randn(B, D, 1, N, generator=torch.Generator().manual_seed(1))


def tokens_of(images):
    return images.flatten(2).transpose(1, 2).reshape(-1, D)
