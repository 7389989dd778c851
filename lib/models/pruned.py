"""An MoE layer that has lost experts, and the stacked weights of experts picked or replaced.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **H** hidden width,
**E** experts before pruning, **E'** those that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..routers.base import Routing
from .experts import Experts
from .moe import MoELayer

STACKS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


class PrunedLayer(MoELayer):
    """Runs E' experts under a router that still decides over E: dropped ones give zero updates.

    So in the released code of Chowdhury et al. 2024 (2405.16646). The rows of dropped experts stay
    in the softmax, in the choice of K and in a capacity, so the gates of the others do not change.
    An assignment to a dropped expert is taken out of the Routing and counted as dropped; a token
    without any other passes by the residual connection (and the shared expert) alone. On the tape
    experts keep their numbers 0..E-1.

    kept: (E',) numbers of the experts that stay, ascending; a buffer of that name.
    """

    def __init__(self, layer: MoELayer, kept: Tensor):
        super().__init__(
            layer.router,
            picked_experts(layer.experts, kept),
            layer.shared,
            layer.dropout,
            layer.channels_first,
        )
        self.register_buffer("kept", kept)
        self.train(layer.training)

    def decide(self, tokens: Tensor) -> Routing:
        """Routes tokens (B, N, D), probabilities (T, E), assignments to experts that stay only."""
        routing = super().decide(tokens)
        alive = torch.isin(routing.expert, self.kept)
        lost = routing.token[~alive]
        return replace(
            routing,
            token=routing.token[alive],
            expert=routing.expert[alive],
            weight=routing.weight[alive],
            dropped=routing.dropped.index_add(0, lost, torch.ones_like(lost)),
        )

    def serve(self, rows: Tensor, routing: Routing) -> Tensor:
        """Computes (T, D) from rows (T, D), with experts renumbered for the shorter stack."""
        place = torch.searchsorted(self.kept, routing.expert)
        return self.experts(rows, replace(routing, expert=place, probs=routing.probs[:, self.kept]))


def stacks_of(experts: Experts) -> list[Tensor]:
    """Lists the parameters of `STACKS`: (E, H, D), (E, H), (E, D, H), (E, D); gated: 2 H for the
    first two.

    Experts of unequal width have no such stacks and are not asked for them.
    """
    return [experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias]


def with_stacks(experts: Experts, stacks: Sequence[Tensor]) -> Experts:
    """Builds E' experts from stacks (E', H, D), (E', H), (E', D, H), (E', D).

    Activation, mode and frozen parameters are those of `experts`.
    """
    with torch.device("meta"):  # no initialisation that is overwritten at once
        built = Experts(len(stacks[0]), experts.width, stacks[2].shape[2], experts.act)
    for name, stack, old in zip(STACKS, stacks, stacks_of(experts), strict=True):
        layer, parameter = name.split(".")
        new = nn.Parameter(stack.contiguous(), requires_grad=old.requires_grad)
        setattr(getattr(built, layer), parameter, new)
    return built.train(experts.training)


def picked_experts(experts: Experts, index: Tensor) -> Experts:
    """Builds the experts of these numbers, (E',), with copies of their weights."""
    return with_stacks(experts, [stack.detach()[index] for stack in stacks_of(experts)])
