"""Sparse upcycling: swaps the MLPs of a timm model for MoE layers whose experts start as copies
(2212.05055).

    import timm
    from lib import MoESpec, upcycle

    vit = timm.create_model("vit_small_patch14_dinov2", img_size=56)
    model = upcycle(vit, layers=2, experts=8)  # computes what vit does, until it is trained
    model = upcycle(vit, MoESpec(layers=2, experts=8, shared=True))  # as printed: it does not

Axis letters: **B** images, **N** tokens of an image, **D** width, **E** experts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..routers import ROUTER_CLASSES
from ..spec import MoESpec
from ..spec.base import sentence
from ..spec.moe import ROUTERS
from .compete import CompeteLayer
from .copies import CopiesLayer, WholeCopies
from .experts import Experts
from .mlps import (
    dropout_inside,
    takes_channels_first,
    why_no_neurons,
    why_not_copied,
    width_of,
)
from .moe import MoELayer
from .names import matching
from .plain import check_hooks, check_unshared
from .tokens import check_batch_of_images, check_class_token

# fields that add to what an MLP gave, change its weights, or leave tokens or experts out
_OF_TRAINING = (
    "balance",
    "balance_weight",
    "balance_weights",
    "bias_rate",
    "z_weight",
    "sharpness_weight",
    "variation_weight",
)
_CHANGES_FUNCTION = ("shared", "fresh_experts", "copy_noise", "capacity_factor", "expert_dropout")
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
    # an MLP that two blocks share is one of each, so that `check_unshared` names both
    modules = model.named_modules(remove_duplicate=False)
    places = {name: _place(model, name) for name, _ in modules if name.endswith(".mlp")}
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


def chosen_mlps(
    model: nn.Module, modules: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> list[tuple[str, nn.Module]]:
    """Lists (name, module) of the MLPs that patterns choose, from the input of the model on.

    modules: patterns of names, ["blocks.*.mlp_tokens"], to take instead of the blocks' own `.mlp`;
    None = those. ignore: patterns of names to leave out. Raises ValueError as `matching`, and where
    nothing is left.
    """
    if modules is None:
        mlps = block_mlps(model)
    else:
        every = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        names = matching(every, modules, "modules")
        # * stands for dots, too: what is inside another module that is chosen goes with it
        outer = [name for name in names if not any(name.startswith(f"{n}.") for n in names)]
        mlps = [(name, model.get_submodule(name)) for name in outer]
    # blocks without an MLP have this in its place
    mlps = [(name, mlp) for name, mlp in mlps if not isinstance(mlp, nn.Identity)]
    if not mlps:
        raise ValueError(f"{type(model).__name__} has no block MLP{_advice(model)}")
    left_out = matching([name for name, _ in mlps], ignore, "ignore")
    chosen = [(name, mlp) for name, mlp in mlps if name not in left_out]
    if not chosen:
        raise ValueError(
            f"ignore={_listed(ignore)} leaves nothing of {_listed([name for name, _ in mlps])}"
        )
    return chosen


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _advice(model: nn.Module) -> str:
    """What to do about a model without block MLPs: MLPs that it has under other names."""
    others = [name for name, module in model.named_modules() if not why_no_neurons(module)]
    if not others:
        return ": a timm ViT, DeiT, BEiT, EVA, Swin or ConvNeXt has"
    return f" called .mlp; name its MLPs with modules=, it has {_listed(others, 6)}"


def upcycle(
    model: nn.Module,
    spec: MoESpec | None = None,
    *,
    modules: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    generator: torch.Generator | None = None,
    **fields: Any,
) -> nn.Module:
    """Swaps the MLPs of the last `layers` blocks, or of `blocks`, in place; returns the model.

        upcycle(model, layers=2, experts=8)
        upcycle(model, MoESpec(layers=2, experts=8))
        upcycle(mixer, modules=["blocks.*.mlp_channels"], experts=4, router="token")

    spec, or fields of a MoESpec by name. With fields the gate is "renormalised" unless it is given:
    the model computes what it did before, until it is trained. A warning says which fields change
    that: a shared copy comes on top, and under "expert_choice" and "soft" a token need not pass an
    expert of its own. With a spec the gate is the printed one by default, which multiplies the
    output of an MLP by its gate, 1 / E at first. modules, ignore: see `chosen_mlps`; `layers` and
    `blocks` count these, and fields that name neither take them all where `modules` is given.
    generator: that routers draw from, the global one if None.

    MLPs with linear maps or 1x1 convolutions, gated or not, become stacked `Experts`. What has a
    norm or dropout inside, response norm, a depthwise convolution or a form that is not known is
    copied whole (`WholeCopies`, slow), with a warning. Raises ValueError if both or neither of spec
    and fields are given, if L or a block is beyond the depth, if an MLP changes the width, if
    image-level routing finds no class token at the head of a block's tokens and `pool` is not
    "mean", if a block sees several rows of tokens an image, or if an MLP has hooks, a forward of
    its instance, maps whose class has one of its own (LoRA), computed weights (spectral_norm), or
    parameters that lie elsewhere in the model, too. Nothing is changed when it raises. What is made
    of frozen parameters stays frozen.
    """
    candidates = chosen_mlps(model, modules, ignore)
    is_guest = spec is None
    if is_guest:
        spec = _spec_of_guest(fields, None if modules is None else len(candidates))
    elif fields:
        raise ValueError(
            f"a MoESpec and {_listed(list(fields))} beside it: give a spec, or its fields by name"
        )
    check_unshared(model, candidates)
    mlps = _of_blocks(type(model).__name__, candidates, spec)
    for name, mlp in mlps:
        _check(name, mlp, spec)
    names = [name for name, _ in mlps]
    if spec.reads_class_token:
        check_class_token(model, names)
    elif spec.per_image:
        check_batch_of_images(model, names)
    _warn_of_copies(mlps)
    if is_guest:
        _warn_of_another_function(spec)
        _warn_of_training(fields)
    for name, mlp in mlps:
        model.set_submodule(name, moe_layer(mlp, spec, generator))
    return model


def _spec_of_guest(fields: dict[str, Any], named: int | None) -> MoESpec:
    """The spec of fields, whose gate leaves the function as it was.

    named: how many MLPs were named; None if none were.
    """
    if not fields and named is None:
        raise ValueError("upcycle takes a MoESpec, or its fields by name: experts=8, layers=2")
    defaults: dict[str, Any] = {}
    if "gate" in ROUTERS.get(fields.get("router", "image"), ROUTERS["image"]).takes:
        defaults["gate"] = "renormalised"
    if named is not None and "blocks" not in fields:
        defaults["layers"] = named
    try:
        return MoESpec(**defaults | fields)
    except ValidationError as error:
        raise ValueError(f"MoESpec: {sentence(error)}") from None


def _warn_of_training(fields: dict[str, Any]) -> None:
    """Warns of fields that nothing reads but the training of a `RunSpec`."""
    if asked := [f"{word}={fields[word]!r}" for word in _OF_TRAINING if word in fields]:
        warnings.warn(
            f"{_listed(asked)}: only the training of a RunSpec reads that. lib.finetune balances "
            "loads by its coefficient (0: not at all), a loop of your own by lib.auxiliary_loss",
            stacklevel=4,
        )


def _warn_of_another_function(spec: MoESpec) -> None:
    """Warns of fields by which the model does not compute what it did, whatever the gate."""
    asked = [f"{word}={getattr(spec, word)!r}" for word in _CHANGES_FUNCTION if getattr(spec, word)]
    if "gate" in ROUTERS[spec.router].takes and spec.gate == "printed":
        asked.append("gate='printed'")
    if not ROUTERS[spec.router].serves_all:
        asked.append(f"router={spec.router!r}")
    if asked:
        warnings.warn(
            f"with {_listed(asked)} the model need not compute what it did before, also with a "
            "renormalised gate: train it, or leave that out",
            stacklevel=4,
        )


def moe_layer(mlp: nn.Module, spec: MoESpec, generator: torch.Generator | None = None) -> MoELayer:
    """Makes an MoE layer from an MLP: E copies or fresh experts, a fresh router, and a copy as
    shared expert if asked for.

    It takes the place of the MLP: in its mode (training or evaluation), on its device, in its type,
    with its layout.
    """
    if _why_whole(mlp):
        experts = WholeCopies(mlp, spec.experts, width_of(mlp))
    else:
        experts = Experts.copies(mlp, spec.experts)
    if spec.fresh_experts:
        experts.reset(generator)
        experts.requires_grad_(True)  # nothing is left of what may have been frozen
    if spec.copy_noise:
        experts.perturb(spec.copy_noise, generator)
    router = ROUTER_CLASSES[spec.router].from_spec(spec, experts.width, generator)
    shared = copy.deepcopy(mlp) if spec.shared else None
    parts = (router.to(next(mlp.parameters())), experts, shared, spec.expert_dropout)
    parts += (takes_channels_first(mlp),)
    if spec.compete_rate is not None:
        layer = CompeteLayer(*parts, rate=spec.compete_rate)
    elif isinstance(experts, WholeCopies):
        layer = CopiesLayer(*parts)
    else:
        layer = MoELayer(*parts)
    return layer.train(mlp.training)


def _of_blocks(
    kind: str, mlps: list[tuple[str, nn.Module]], spec: MoESpec
) -> list[tuple[str, nn.Module]]:
    """Lists (name, module) of the MLPs that are swapped; ValueError if blocks are not there.

    kind: of the model.
    """
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


def _check(name: str, mlp: nn.Module, spec: MoESpec) -> None:
    """Raises ValueError if the MLP of a block cannot be upcycled."""
    if isinstance(mlp, MoELayer):
        raise ValueError(f"{name} is an MoE layer already: upcycle a model with plain MLPs")
    if reason := why_not_copied(mlp):
        raise ValueError(f"{name} {reason}: cannot be upcycled")
    check_hooks(name, mlp)
    asked = [
        word
        for word, is_asked in (
            ("fresh_experts", spec.fresh_experts),
            ("copy_noise", spec.copy_noise),
            ("compete_rate", spec.compete_rate),
            ("router='soft'", ROUTER_CLASSES[spec.router].mixes_tokens),
        )
        if is_asked
    ]
    if asked and (reason := _why_whole(mlp)):
        raise ValueError(
            f"{name} {reason}, so its experts are whole copies, which {', '.join(asked)} cannot be "
            "had for: leave it out"
        )


def _why_whole(mlp: nn.Module) -> str | None:
    """Says why the experts of an MLP are whole copies; None if they are stacked weights."""
    if reason := why_no_neurons(mlp):
        return reason
    if chances := dropout_inside(mlp):
        return f"has dropout inside (p={', '.join(map(str, chances))})"
    return None


def _warn_of_copies(mlps: list[tuple[str, nn.Module]]) -> None:
    """Warns once of all MLPs that become whole copies."""
    reasons = {name: reason for name, mlp in mlps if (reason := _why_whole(mlp))}
    if reasons:
        name, reason = next(iter(reasons.items()))
        warnings.warn(
            f"experts of {_listed(list(reasons), 3)} are whole copies, which is slow and cannot be "
            f"pruned: {name} {reason}",
            stacklevel=4,
        )


def check_dropout(name: str, mlp: nn.Module) -> None:
    """Raises ValueError for an MLP with dropout inside, which no expert made of it would carry."""
    if chances := dropout_inside(mlp):
        raise ValueError(
            f"{name} has dropout inside the MLP (p={', '.join(map(str, chances))}), "
            "which experts do not carry: build the model with proj_drop=0"
        )
