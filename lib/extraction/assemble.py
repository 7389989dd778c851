"""Modules made of experts' weights: a narrower MLP, or a mixture in one of the storages.

Axis letters: **D** width, **S** neurons that stay, **E** experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.experts import Experts
from ..models.mlps import MlpWeights, maps_of
from ..models.moe import MoELayer
from ..models.shared_experts import SharedExperts
from ..routers.hard import HardRouter
from .correction import kept_weights


def narrow_mlp(mlp: nn.Module, weights: MlpWeights) -> nn.Module:
    """Copies an MLP and gives the copy these weights, of another hidden width."""
    return maps_of(mlp).with_weights(weights)


def mixture(
    mlp: nn.Module,
    weights: Sequence[MlpWeights],
    kept_neurons: Sequence[Tensor],
    router: HardRouter,
    common: MlpWeights | None,
    storage: str,
) -> MoELayer:
    """Builds the MoE layer of E experts, whose neurons are those of an MLP.

    weights, kept_neurons: of each expert. common: of the part that every token passes. storage: as
    in `ExtractSpec`. What is made of frozen parameters stays frozen.
    """
    maps = maps_of(mlp)
    if storage == "copies":
        experts = Experts.of(weights, maps.act)
    else:
        store = torch.cat(list(kept_neurons)).unique()  # (U,) neurons of any expert
        w1, b1, output_weights, _ = kept_weights(mlp, store)
        if storage == "inputs":
            output_weights = [expert.w2 for expert in weights]
        experts = SharedExperts(
            (w1, b1, output_weights),
            [torch.searchsorted(store, neurons) for neurons in kept_neurons],
            torch.stack([expert.b2 for expert in weights]),
            maps.act,
        )
    maps.freeze_alike(experts.fc1, experts.fc2)
    shared = None if common is None else narrow_mlp(mlp, common)
    return MoELayer(router, experts, shared, channels_first=maps.channels_first)
