"""Makes the layers of other libraries from the weights of ours.

Each has our router, our experts and the weights of the chosen experts renormalised to one. Peers
without biases stand for ours with biases of zero. What drops tokens computes something else, and
is marked.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **H** hidden width,
**E** experts, **K** experts a token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from lib.models.moe import MoELayer

INSTALL = "not installed: pip install .[bench]"


@dataclass(frozen=True)
class Peer:
    """Is a layer of another library.

    make: builds it from a layer of ours. module: what must be importable; None: plain torch. drops:
    whether it drops tokens beyond a capacity. top_k, dtypes: what it can compute; None: all.
    """

    name: str
    make: Callable[[MoELayer], nn.Module]
    module: str | None = None
    drops: bool = False
    top_k: int | None = None
    dtypes: tuple[str, ...] | None = None

    def why_not(self, top_k: int, dtype: str) -> str:
        """Says why it cannot be measured at a K and dtype; "" where it can."""
        if self.top_k not in (None, top_k):
            return f"computes K={self.top_k} alone"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"does not run in {dtype}"
        return "" if self.installed else INSTALL

    @property
    def installed(self) -> bool:
        """Says whether its package is there."""
        return self.module is None or importlib.util.find_spec(self.module) is not None


class MaskLoop(nn.Module):
    """Loops over experts with a mask of their tokens: what one writes first. (B, N, D) to same."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.router, self.mlps = _TopK(layer), nn.ModuleList(_mlps(layer))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight, choice = self.router(rows)
        out = torch.zeros_like(rows)
        for e, mlp in enumerate(self.mlps):
            token, place = (choice == e).nonzero(as_tuple=True)
            served = mlp(rows[token]) * weight[token, place].unsqueeze(1)
            out.index_add_(0, token, served.to(out.dtype))
        return out.view(x.shape)


class TransformersExperts(nn.Module):
    """Runs the experts of transformers that have no gate (those of Nemotron-H)."""

    def __init__(self, layer: MoELayer, how: str):
        super().__init__()
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        w1, w2 = layer.experts.fc1.weight, layer.experts.fc2.weight
        config = SimpleNamespace(
            n_routed_experts=w1.shape[0],
            hidden_size=w1.shape[2],
            moe_intermediate_size=w1.shape[1],
            moe_latent_size=None,
            mlp_hidden_act="gelu",
            _experts_implementation=how,
        )
        self.router, self.experts = _TopK(layer), NemotronHExperts(config)
        self.experts.up_proj.data, self.experts.down_proj.data = w1.data.clone(), w2.data.clone()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight, choice = self.router(rows)
        return self.experts(rows, choice, weight).view(x.shape)


class TensorOfSlots(nn.Module):
    """Runs a layer that dispatches by a (B, N, E, slots) tensor, and keeps its output alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def mixture_of_experts(layer: MoELayer, capacity_factor: float | None = None) -> nn.Module:
    """Makes the layer of mixture-of-experts; second choices always count.

    capacity_factor: of training and evaluation; None: the library's own.
    """
    from mixture_of_experts import MoE

    w1, w2 = layer.experts.fc1.weight.detach(), layer.experts.fc2.weight.detach()
    capacity = _capacities(capacity_factor)
    policy = {"second_policy_train": "all", "second_policy_eval": "all"}
    experts, hidden, width = w1.shape
    moe = MoE(width, experts, hidden, nn.GELU, **policy, **capacity)
    moe.gate.w_gating.data = layer.router.weight.detach().t().clone()
    moe.experts.w1.data = w1.transpose(1, 2).clone()
    moe.experts.w2.data = w2.transpose(1, 2).clone()
    return TensorOfSlots(moe)


def st_moe(layer: MoELayer, capacity_factor: float | None = None) -> nn.Module:
    """Makes the layer of st-moe-pytorch around plain MLPs; second choices always count.

    capacity_factor: of training and evaluation; None: the library's own.
    """
    from st_moe_pytorch import MoE

    experts, _, width = layer.experts.fc1.weight.shape
    moe = MoE(
        width,
        experts,
        threshold_train=0.0,
        threshold_eval=0.0,
        experts=nn.ModuleList(_mlps(layer)),
        **_capacities(capacity_factor),
    )
    moe.gate.to_gates.weight.data = layer.router.weight.detach().clone()
    return TensorOfSlots(moe)


NO_BF16 = ("fp32", "autocast")  # their masks are float32 whatever the tokens are
PEERS = (
    Peer("mask loop", MaskLoop),
    Peer("transformers, eager", lambda layer: TransformersExperts(layer, "eager"), "transformers"),
    Peer(
        "transformers, grouped",
        lambda layer: TransformersExperts(layer, "grouped_mm"),
        "transformers",
    ),
    Peer("mixture-of-experts", mixture_of_experts, "mixture_of_experts", True, 2, NO_BF16),
    Peer("st-moe-pytorch", st_moe, "st_moe_pytorch", True, 2, NO_BF16),
)


class _TopK(nn.Module):
    """Weighs and chooses the K most probable experts: (T, D) -> (T, K) weights, (T, K) experts."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.weight = nn.Parameter(layer.router.weight.detach().clone())
        self.top_k = layer.router.top_k

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        probs = F.linear(rows, self.weight).float().softmax(dim=-1)
        weight, choice = probs.topk(self.top_k, dim=-1)
        return (weight / weight.sum(dim=-1, keepdim=True)).to(rows.dtype), choice


def _mlps(layer: MoELayer) -> list[Mlp]:
    """Copies the experts of a layer into MLPs."""
    copies = []
    for weights in layer.experts.each():
        mlp = Mlp(weights[0].shape[1], weights[0].shape[0])
        places = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        for place, weight in zip(places, weights, strict=True):
            place.data = weight.detach().clone()
        copies.append(mlp)
    return copies


def _capacities(factor: float | None) -> dict[str, float]:
    if factor is None:
        return {}
    return {"capacity_factor_train": factor, "capacity_factor_eval": factor}
