"""Sparse upcycling: swaps the MLPs of a timm model for MoE layers whose experts start as copies
(2212.05055).

    import timm
    from lib import MoESpec, upcycle

    vit = timm.create_model("vit_small_patch14_dinov2", img_size=56)
    model = upcycle(vit, MoESpec(layers=2, experts=8, shared=True))

Axis letters: **B** images, **N** tokens of an image, **D** width, **E** experts.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..routers import ROUTER_CLASSES
from ..spec import MoESpec
from .compete import CompeteLayer
from .experts import Experts
from .moe import MoELayer
from .tokens import check_batch_of_images, check_class_token

REFUSED = {
    "GluMlp": "a gated (GLU) MLP",
    "SwiGLU": "a gated (GLU) MLP",
    "SwiGLUPacked": "a gated (GLU) MLP",
    "GatedMlp": "a gated MLP",
    "ConvMlp": "a convolutional MLP",
    "GlobalResponseNormMlp": "an MLP with response norm (GRN)",
}
LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)  # what modules that repeat are kept in


def before_blocks(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Computes what a timm ViT hands to its first block.

    images: (B, channels, height, width) -> (B, N, D).
    """
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


def block_mlps(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Lists (name, module) of the MLP of each block, in order.

    Blocks repeat, so they are kept in lists, and their MLPs lie nearest below these. What is called
    `mlp` and lies deeper makes something inside a block (the position bias of an attention, a
    gate); what lies in no list, where others do, belongs to a head (pooling). A model without lists
    has its blocks' MLPs nearest below itself.
    """
    places = {
        name: _place(model, name) for name, _ in model.named_modules() if name.endswith(".mlp")
    }
    nearest = min(places.values(), default=None)
    return [(name, model.get_submodule(name)) for name, place in places.items() if place == nearest]


def _place(model: nn.Module, name: str) -> tuple[bool, int]:
    """Tells whether no list holds what the MLP `name` lies in, and how many modules are between
    that and the innermost list, or the model."""
    modules = [model]
    for part in name.split(".")[:-1]:
        modules.append(modules[-1].get_submodule(part))
    above = modules[-2::-1]  # what holds the MLP may be a list of its parts: that is no list here
    for between, module in enumerate(above):
        if isinstance(module, LISTS):
            return False, between
    return True, len(above)


def upcycle(model: nn.Module, spec: MoESpec, generator: torch.Generator | None = None) -> nn.Module:
    """Swaps the MLPs of the last `spec.layers` blocks, or of `spec.blocks`, in place; returns the
    model.

    Works on models of timm whose block MLP is `timm.layers.Mlp` with Linear fc1 and fc2 and no
    inner norm (ViT, DeiT, BEiT, Swin, ConvNeXt). Routers draw from `generator`, from the global one
    if None. Raises ValueError if L or a block is beyond the depth, if a block's MLP is of another
    kind, if image-level routing finds no class token at the head of a block's tokens and
    `spec.pool` is not "mean", or if a block sees several rows of tokens an image. Nothing is
    changed when it raises.
    """
    mlps = _chosen_mlps(model, spec)
    for name, mlp in mlps:
        _check(name, mlp)
    names = [name for name, _ in mlps]
    if spec.reads_class_token:
        check_class_token(model, names)
    elif spec.per_image:
        check_batch_of_images(model, names)
    for name, mlp in mlps:
        parent = model.get_submodule(name.rpartition(".")[0])
        parent.mlp = moe_layer(mlp, spec, generator)
    return model


def moe_layer(mlp: nn.Module, spec: MoESpec, generator: torch.Generator | None = None) -> MoELayer:
    """Makes a MoE layer from an MLP: E copies or fresh experts, a fresh router, and a copy as
    shared expert if asked for.

    It takes the place of the MLP: in its mode (training or evaluation), on its device, in its type.
    """
    experts = Experts.copies(mlp, spec.experts)
    if spec.fresh_experts:
        experts.reset(generator)
    if spec.copy_noise:
        experts.perturb(spec.copy_noise, generator)
    router = ROUTER_CLASSES[spec.router].from_spec(spec, experts.width, generator)
    shared = copy.deepcopy(mlp) if spec.shared else None
    parts = (router.to(mlp.fc1.weight), experts, shared, spec.expert_dropout)
    if spec.compete_rate is None:
        layer = MoELayer(*parts)
    else:
        layer = CompeteLayer(*parts, rate=spec.compete_rate)
    return layer.train(mlp.training)


def _chosen_mlps(model: nn.Module, spec: MoESpec) -> list[tuple[str, nn.Module]]:
    """Lists (name, module) of the MLPs that are swapped; ValueError if blocks are not there."""
    mlps, kind = block_mlps(model), type(model).__name__
    if not mlps:
        raise ValueError(
            f"{kind} has no block MLP to swap: a timm ViT, DeiT, BEiT, Swin or ConvNeXt has"
        )
    if spec.layers > len(mlps):
        raise ValueError(
            f"layers={spec.layers} is beyond the depth: {kind} has {len(mlps)} blocks, "
            f"valid is 1 to {len(mlps)}"
        )
    if spec.blocks is None:
        return mlps[-spec.layers :]
    if spec.blocks[-1] > len(mlps):
        raise ValueError(
            f"blocks={spec.blocks} goes beyond the depth: {kind} has {len(mlps)} blocks, "
            f"valid is 1 to {len(mlps)}"
        )
    return [mlps[number - 1] for number in spec.blocks]


def _check(name: str, mlp: nn.Module) -> None:
    """Raises ValueError if the MLP of a block cannot be upcycled."""
    if isinstance(mlp, MoELayer):
        raise ValueError(f"{name} is a MoE layer already: upcycle a model with plain MLPs")
    if reason := why_not_plain(mlp):
        raise ValueError(f"{name} {reason}: cannot be upcycled")
    check_dropout(name, mlp)


def why_not_plain(mlp: nn.Module) -> str | None:
    """Says why an MLP is not two linear maps with a function between; None if it is.

    Upcycling, pruning and extraction take the same ones, with biases or without.
    """
    kind = type(mlp).__name__
    if kind in REFUSED:
        return (
            f"is {REFUSED[kind]} ({kind}); what is taken is timm.layers.Mlp with Linear fc1 and fc2"
        )
    plain = (
        isinstance(mlp, Mlp)
        and type(mlp).forward is Mlp.forward
        and isinstance(mlp.fc1, nn.Linear)
        and isinstance(mlp.fc2, nn.Linear)
    )
    if not plain:
        return f"({kind}) is not a timm.layers.Mlp with Linear fc1 and fc2 (channels last)"
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        return "has a norm inside the MLP, which depends on all hidden neurons at once"
    return None


def check_dropout(name: str, mlp: Mlp) -> None:
    """Raises ValueError for an MLP with dropout inside, which no expert made of it would carry."""
    if getattr(mlp, "drop1", None) is not None and (mlp.drop1.p or mlp.drop2.p):
        raise ValueError(
            f"{name} has dropout inside the MLP (p={mlp.drop1.p}, {mlp.drop2.p}), "
            "which experts do not carry: build the model with proj_drop=0"
        )
