"""Experts that are whole copies of an MLP: the slow path for kinds whose neurons are not known.

Stacked weights (`Experts`) stand for two maps with a function between. What has a norm, a spatial
gate or a depthwise convolution inside is copied as it is, and its copies run one after the other.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..routers.base import Routing
from .mlps import is_token_wise
from .moe import MoELayer


class WholeCopies(nn.Module):
    """Holds E whole copies of an MLP and applies each by assignment.

    Where the MLP computes each token alone, a copy runs on the tokens that are assigned to it. Else
    (response norm, depthwise convolution, or nothing known) it runs on the whole images that have
    such a token, and its outputs are read at these tokens: up to E times the work of the MLP. A
    copy that got nothing has a zero gradient, as an expert of `Experts` has.

    width: D.
    """

    def __init__(self, mlp: nn.Module, experts: int, width: int):
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(mlp) for _ in range(experts))
        self.experts, self.width, self.token_wise = experts, width, is_token_wise(mlp)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Computes for each token the weighted sum over its assignments: x, (T, D) -> (T, D)."""
        out = x.new_zeros(x.shape)
        for e, mlp in enumerate(self.copies):
            chosen = routing.expert == e
            token, weight = routing.token[chosen], routing.weight[chosen].to(x.dtype)
            if len(token):
                rows = mlp(x[token].unsqueeze(0))[0] * weight.unsqueeze(1)
                out = out.to(rows.dtype).index_add(0, token, rows)
            else:
                out = _with_idle(out, mlp)
        return out

    def of_images(self, x: Tensor, routing: Routing, channels_first: bool) -> Tensor:
        """Computes the same, (B, ..., D) -> (B, ..., D), each copy on whole images.

        channels_first: whether the copies take and give (B, D, ...).
        """
        b, n = routing.shape
        out = x.new_zeros(x.shape)
        for e, mlp in enumerate(self.copies):
            chosen = routing.expert == e
            token, weight = routing.token[chosen], routing.weight[chosen].to(x.dtype)
            images = (token // max(n, 1)).unique()
            if not len(images):
                out = _with_idle(out, mlp)
                continue
            weight_of_token = x.new_zeros(b * n).index_add(0, token, weight)
            weight_of_token = weight_of_token.view(*x.shape[:-1], 1)[images]
            inputs = x[images]
            rows = mlp(inputs.movedim(-1, 1)).movedim(1, -1) if channels_first else mlp(inputs)
            out = out.to(rows.dtype).index_add(0, images, rows * weight_of_token)
        return out

    def extra_repr(self) -> str:
        return f"experts={self.experts}, width={self.width}, token_wise={self.token_wise}"


class CopiesLayer(MoELayer):
    """Is an MoE layer whose experts are `WholeCopies`."""

    def serve_images(self, tokens: Tensor, routing: Routing, shape: torch.Size) -> Tensor:
        """Carries out a Routing: tokens, (B, N, D) -> (B, ..., D), which is `shape`."""
        if self.experts.token_wise:
            return super().serve_images(tokens, routing, shape)
        return self.experts.of_images(tokens.view(shape), routing, self.channels_first)


def _with_idle(out: Tensor, mlp: nn.Module) -> Tensor:
    """Adds zero times the parameters of a copy without tokens: its gradient is zero, not none."""
    if not torch.is_grad_enabled():
        return out
    return out + 0.0 * sum(parameter.sum() for parameter in mlp.parameters()).to(out.dtype)
