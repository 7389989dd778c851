"""Sparse upcycling: swap the MLPs of a timm model for MoE layers whose experts start as copies
(2212.05055).

import timm; from lib import MoESpec, upcycle model =
upcycle(timm.create_model("vit_small_patch14_dinov2", img_size=56), MoESpec(layers=2, experts=8,
shared=True))
"""

from __future__ import annotations

import copy

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..routers.all import AllExperts
from ..routers.expert_choice import ExpertChoiceRouter
from ..routers.manual import ManualRouter
from ..routers.priority import PriorityRouter
from ..routers.top_k import TopKRouter
from ..spec import MoESpec
from .compete import CompeteLayer
from .experts import Experts
from .moe import MoELayer, RoutedLayer
from .soft import SoftMoELayer

REFUSED = {
    "GluMlp": "a gated (GLU) MLP",
    "SwiGLU": "a gated (GLU) MLP",
    "SwiGLUPacked": "a gated (GLU) MLP",
    "GatedMlp": "a gated MLP",
    "ConvMlp": "a convolutional MLP",
    "GlobalResponseNormMlp": "an MLP with response norm (GRN)",
}


def before_blocks(vit: VisionTransformer, images: Tensor) -> Tensor:
    """images: (B, channels, height, width) -> (B, N, D), what a timm ViT hands to its first block."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


def block_mlps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the MLP of each block, in order. MLPs inside pooling heads are not blocks
    and stay out."""
    found = []
    for name, module in model.named_modules():
        if name.endswith(".mlp") and not any(part in name for part in ("attn_pool", "head")):
            found.append((name, module))
    return found


def upcycle(model: nn.Module, spec: MoESpec, generator: torch.Generator | None = None) -> nn.Module:
    """Swap the MLPs of the last `spec.layers` blocks, or of `spec.blocks`, in place; returns the
    model.

    Works on models of timm whose block MLP is `timm.layers.Mlp` with Linear fc1 and fc2 and no
    inner norm (ViT, DeiT, BEiT, Swin, ConvNeXt). Routers draw from `generator`, from the global one
    if None. Raises ValueError if L or a block is beyond the depth, if a block's MLP is of another
    kind, or if image-level routing finds no class token and `spec.pool` is not "mean". Nothing is
    changed when it raises.
    """
    mlps = block_mlps(model)
    if not mlps:
        raise ValueError(
            f"{type(model).__name__} has no block MLP to swap: a timm ViT, DeiT, BEiT, Swin or ConvNeXt has"
        )
    if spec.layers > len(mlps):
        raise ValueError(
            f"layers={spec.layers} is beyond the depth: {type(model).__name__} has {len(mlps)} blocks, "
            f"valid is 1 to {len(mlps)}"
        )
    if spec.blocks is not None and spec.blocks[-1] > len(mlps):
        raise ValueError(
            f"blocks={spec.blocks} goes beyond the depth: {type(model).__name__} has {len(mlps)} blocks, "
            f"valid is 1 to {len(mlps)}"
        )
    chosen = (
        mlps[-spec.layers :]
        if spec.blocks is None
        else [mlps[number - 1] for number in spec.blocks]
    )
    for name, mlp in chosen:
        _check(name, mlp)
    if (
        spec.router == "image"
        and spec.pool == "class"
        and not getattr(model, "num_prefix_tokens", 0)
    ):
        raise ValueError(
            f"image-level routing reads the class token, and {type(model).__name__} has none: "
            "ask for the mean token with pool='mean', or for router='token'"
        )
    for name, mlp in chosen:
        parent = model.get_submodule(name.rpartition(".")[0])
        parent.mlp = moe_layer(mlp, spec, generator)
    return model


def moe_layer(mlp: nn.Module, spec: MoESpec, generator: torch.Generator | None = None) -> nn.Module:
    """One MoE layer from one MLP: E copies or fresh experts, a fresh router, and a copy as shared
    expert if asked for."""
    experts = Experts.copies(mlp, spec.experts)
    if spec.fresh_experts:
        experts.reset(generator)
    if spec.copy_noise:
        experts.perturb(spec.copy_noise, generator)
    if spec.router == "soft":
        return SoftMoELayer(experts, spec.slots, generator).to(mlp.fc1.weight.device)
    made = router(spec, experts.width, generator).to(mlp.fc1.weight.device)
    parts = (made, experts, copy.deepcopy(mlp) if spec.shared else None, spec.expert_dropout)
    return (
        MoELayer(*parts)
        if spec.compete_rate is None
        else CompeteLayer(*parts, rate=spec.compete_rate)
    )


def router(spec: MoESpec, width: int, generator: torch.Generator | None = None) -> nn.Module:
    """The router that a spec names, drawn where the generator lies, usually the CPU."""
    if spec.router == "all":
        return AllExperts(spec.experts, spec.gate)
    if spec.router == "manual":
        return ManualRouter(
            spec.experts, {c: e for e, classes in enumerate(spec.groups) for c in classes}
        )
    shared = {
        "gate": spec.gate,
        "noise": spec.noise,
        "std": spec.router_std,
        "generator": generator,
    }
    if spec.router == "expert_choice":
        return ExpertChoiceRouter(
            width, spec.experts, choices=spec.choices, group=spec.group, **shared
        )
    if spec.router == "priority":
        return PriorityRouter(width, spec.experts, group=spec.group, **shared)
    return TopKRouter(
        width,
        spec.experts,
        spec.top_k,
        per_image=spec.router == "image",
        pool=spec.pool,
        capacity_factor=spec.capacity_factor,
        batch_priority=spec.batch_priority,
        **shared,
    )


def _check(name: str, mlp: nn.Module) -> None:
    kind = type(mlp).__name__
    if isinstance(mlp, RoutedLayer):
        raise ValueError(f"{name} is a MoE layer already: upcycle a model with plain MLPs")
    if kind in REFUSED:
        raise ValueError(
            f"{name} is {REFUSED[kind]} ({kind}); upcycling takes timm.layers.Mlp with Linear fc1 and fc2"
        )
    plain = (
        isinstance(mlp, Mlp) and isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.fc2, nn.Linear)
    )
    if not plain:
        raise ValueError(
            f"{name} ({kind}) is not a timm.layers.Mlp with Linear fc1 and fc2 (channels last): "
            "cannot be upcycled"
        )
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise ValueError(
            f"{name} has a norm inside the MLP, which copies of fc1 and fc2 would lose: cannot be upcycled"
        )
    if getattr(mlp, "drop1", None) is not None and (mlp.drop1.p or mlp.drop2.p):
        raise ValueError(
            f"{name} has dropout inside the MLP (p={mlp.drop1.p}, {mlp.drop2.p}), which experts do not carry: "
            "build the model with proj_drop=0"
        )
