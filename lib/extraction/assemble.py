"""Modules made of experts' weights: a narrower MLP, or a mixture in one of the storages.

Axis letters: **D** width, **S** neurons that stay, **E** experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ..models.experts import Experts
from ..models.moe import MoELayer
from ..models.shared_experts import SharedExperts
from ..routers.hard import HardRouter
from .correction import MlpWeights, weights_of


def narrow_mlp(mlp: Mlp, weights: MlpWeights) -> Mlp:
    """Copies an MLP and gives the copy these weights, of another hidden width."""
    narrow = copy.deepcopy(mlp)
    for linear, weight, bias in (
        (narrow.fc1, weights.w1, weights.b1),
        (narrow.fc2, weights.w2, weights.b2),
    ):
        linear.weight, linear.bias = (
            None if tensor is None else nn.Parameter(tensor.detach().clone().contiguous())
            for tensor in (weight, bias)
        )
        linear.out_features, linear.in_features = weight.shape
    return narrow


def mixture(
    mlp: Mlp,
    weights: Sequence[MlpWeights],
    kept_neurons: Sequence[Tensor],
    router: HardRouter,
    common: MlpWeights | None,
    storage: str,
) -> MoELayer:
    """Builds the MoE layer of E experts, whose neurons are those of an MLP.

    weights, kept_neurons: of each expert. common: of the part that every token passes. storage: as
    in `ExtractSpec`.
    """
    if storage == "copies":
        experts = Experts.of(weights, mlp.act)
    else:
        store = torch.cat(list(kept_neurons)).unique()  # (U,) neurons of any expert
        whole = weights_of(mlp)
        output_weights = whole.w2[:, store]
        if storage == "inputs":
            output_weights = [expert.w2 for expert in weights]
        experts = SharedExperts(
            (whole.w1[store], whole.b1[store], output_weights),
            [torch.searchsorted(store, neurons) for neurons in kept_neurons],
            torch.stack([expert.b2 for expert in weights]),
            mlp.act,
        )
    return MoELayer(router, experts, None if common is None else narrow_mlp(mlp, common))
