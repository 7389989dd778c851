"""Builds the model of a run: a timm model of the right input size, with its head and weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..routers.base import Router
from ..spec import BackboneSpec, MoESpec, RunSpec
from . import published
from .ensemble import ensemble
from .mae import MaskedAutoencoder
from .upcycle import upcycle


def build(
    spec: RunSpec,
    classes: int,
    channels: int,
    parent: dict[str, Tensor] | None = None,
    fit: Callable[[nn.Module, dict[str, Tensor]], nn.Module] | None = None,
) -> nn.Module:
    """Builds the model of a run before its steps and its training.

    parent: final state of `spec.init`, in place of pretrained weights. Where either is dense, its
    weights are loaded before upcycling, which makes experts of its MLPs; where it has MoE layers,
    they are loaded after upcycling, which makes the layers that they fit. Of a masked
    autoencoder the encoder is taken. With another router the parent's router weights stay if they
    fit; a head for other classes is not taken over. fit: gives the model the structure of a parent
    that was changed by steps (`step.Step`), before the parent's weights are loaded.

    Random parts (head, router, weights that are not pretrained) depend on `spec.seed` alone; the
    global generator is left as it was. Raises ValueError as `create`, `upcycle` and `load_weights`
    do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        generator = torch.Generator().manual_seed(spec.seed)
        model = create(spec.backbone, spec.data.image_size, classes, channels)
        start = _start(model, spec, parent)
        fit = fit if parent is not None else None
        # dense weights: before upcycling, since the experts are made of their MLPs
        if start is not None and not start.has_experts:
            model = model if fit is None else fit(model, start.state)
            load_weights(model, start.state, start.origin, start.grid)
        if spec.moe is not None:
            upcycle(model, spec.moe, generator=generator)
        # weights with experts: after upcycling, since a dense model has no place for them
        if start is not None and start.has_experts:
            model = model if fit is None else fit(model, start.state)
            state = start.state if parent is None else _with_routers_of(model, start.state)
            load_weights(model, state, start.origin, start.grid)
        if spec.fresh_routers:
            for module in model.modules():
                if isinstance(module, Router):
                    module.reset(generator)
        if spec.train is not None and spec.train.mask is not None:
            model = MaskedAutoencoder(model, spec.train.mask)
        if spec.moe is not None and spec.moe.members > 1:
            model = ensemble(model, spec.moe.members)
    if spec.dtype == "bfloat16" and spec.device == "cpu":
        write_out_attention(model)
    return model


class Start(NamedTuple):
    """Holds the weights that a run starts from, and what must be known to load them.

    origin: where they come from, for messages; grid: see `load_weights`; has_experts: whether they
    are of a model with MoE layers.
    """

    state: dict[str, Tensor]
    origin: str
    grid: tuple[int, int] | None
    has_experts: bool


def _start(model: nn.Module, spec: RunSpec, parent: dict[str, Tensor] | None) -> Start | None:
    """Gives the weights of a parent, or else those that the backbone names; None if none."""
    if parent is not None:
        state = _weights_for_child(parent, spec, heads_of(model))
        grid = square_grid(model, spec.init.data.image_size)
        return Start(state, f"run {spec.init.id}", grid, spec.init.moe is not None)
    backbone = spec.backbone
    if spec.init is not None or not backbone.weights:
        return None
    state = published.state_for(model, backbone)
    if backbone.brings_experts:
        published.check_experts(model, state, spec.moe, backbone.weights)
    grid = published.grid_of(state, backbone)
    return Start(state, backbone.weights, grid, backbone.brings_experts)


def write_out_attention(model: nn.Module) -> None:
    """Makes timm's attention layers multiply and normalise step by step, without a fused kernel.

    On CPU the backward pass of torch's fused kernel is slow in bfloat16: it took half of a training
    step with heads of 16 channels, and a third with heads of 64 (`make bench` shows the ratio). The
    result differs by rounding only.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Lists how the names of a timm model's classifier begin: one head, or two in a distilled DeiT.

    model: also what wraps one as `vit`, as an ensemble does.
    """
    wrapped = getattr(model, "vit", model)
    prefix = "" if wrapped is model else "vit."
    names = wrapped.pretrained_cfg["classifier"]
    return tuple(f"{prefix}{name}." for name in ([names] if isinstance(names, str) else names))


def _weights_for_child(
    state: dict[str, Tensor], spec: RunSpec, heads: tuple[str, ...]
) -> dict[str, Tensor]:
    """Selects from a parent's state what its child starts from.

    That is the encoder of a masked autoencoder, the model inside an ensemble, and everything of
    another model; without the parent's head if the child has other classes.
    """
    # what MaskedAutoencoder and Ensemble call the model that they hold
    for prefix in ("encoder.", "vit."):
        inner = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        state = inner or state
    fields = ("name", "label", "classes")
    if any(getattr(spec.data, field) != getattr(spec.init.data, field) for field in fields):
        return {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    return state


def _with_routers_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces the routers in a parent's state by those of `model`, which take over what fits."""
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, Router):
            prefix = f"{name}."
            parent = {
                key.removeprefix(prefix): state.pop(key)
                for key in list(state)
                if key.startswith(prefix)
            }
            state |= {prefix + key: tensor for key, tensor in module.taken_over(parent).items()}
    return state


def create(spec: BackboneSpec, image_size: int, classes: int, channels: int) -> nn.Module:
    """Creates the timm model with random weights.

    Raises ValueError if timm has no such model, or if the sizes do not fit it or the images.
    """
    if not timm.is_model(spec.name):
        near = get_close_matches(spec.name, timm.list_models(), 5) or timm.list_models()[:5]
        raise ValueError(
            f"backbone name={spec.name!r} is not a timm model; near it: {', '.join(near)}. "
            "timm.list_models() lists all"
        )
    sizes = {
        "patch_size": spec.patch,
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.heads,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    if spec.hidden is not None:
        # timm computes int(width * mlp_ratio): half a neuron more keeps rounding errors out.
        given["mlp_ratio"] = (spec.hidden + 0.5) / spec.width
    if _has_fixed_input_size(spec.name):
        given["img_size"] = image_size
    if spec.brings_experts:
        given["act_layer"] = "gelu_tanh"  # that of V-MoE; timm's ViT has the exact one
    try:
        model = timm.create_model(
            spec.name,
            num_classes=classes,
            in_chans=channels,
            drop_path_rate=spec.drop_path,
            **given,
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        sizes = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"backbone {spec.name} does not take {sizes}: {error}") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch and image_size % patch[0]:
        raise ValueError(
            f"image_size={image_size} is not a multiple of the patch size {patch[0]} of {spec.name}"
        )
    return model


class NothingDrawn(TorchFunctionMode):
    """Skips what initialises tensors in place, which is without effect on the meta device: it would
    take most of the time there."""

    SKIPPED = {
        getattr(Tensor, name)
        for name in ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_")
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.SKIPPED and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def skeleton(
    spec: BackboneSpec | str, image_size: int = 224, classes: int = 1000, moe: MoESpec | None = None
) -> nn.Module:
    """Creates a model on the meta device: shapes without memory, for counting and checking.

    spec: an architecture, or the name of a timm model.
    """
    spec = BackboneSpec(name=spec) if isinstance(spec, str) else spec
    with torch.device("meta"), NothingDrawn(), torch.random.fork_rng(devices=[]):
        model = create(spec, image_size, classes, channels=3)
        return upcycle(model, moe) if moe is not None else model


def load_weights(
    model: nn.Module, state: dict[str, Tensor], origin: str, grid: tuple[int, int] | None = None
) -> None:
    """Copies `state` into `model`; position embeddings of another grid are resampled.

    The classifier heads may differ or be absent: then those of `model` stay. Raises ValueError at
    any other difference, and where nothing says which grid the positions are of. origin: where the
    weights come from, for the error. grid: rows and columns of positions in `state`, see
    `_grid_of_positions`.
    """
    state = dict(state)
    if isinstance(model, VisionTransformer):
        positions = _resampled_positions(model, state, origin, grid)
        state = published.renamed(model, state, origin, _convert_vit)
        state |= {} if positions is None else {"pos_embed": positions}
    model_state = model.state_dict()
    heads = heads_of(model)
    unfit = [
        name
        for name, tensor in state.items()
        if name not in model_state or model_state[name].shape != tensor.shape
    ]
    for name in unfit:
        if name.startswith(heads):
            del state[name]
    wrong = [name for name in unfit if not name.startswith(heads)]
    absent = [name for name in model_state if name not in state and not name.startswith(heads)]
    if wrong or absent:
        shapes = {name: tuple(tensor.shape) for name, tensor in model_state.items()}
        against = [
            f"{name} is {tuple(state[name].shape)}, expected {shapes.get(name, 'no such tensor')}"
            for name in wrong[:3]
        ]
        lacking = [f"{name} {shapes[name]}" for name in absent[:3]]
        raise ValueError(
            f"weights of {origin} do not fit {type(model).__name__}: "
            f"{len(wrong)} do not match (first {wrong[:3]}), "
            f"{len(absent)} are absent (first {absent[:3]}). By timm's names: "
            f"{'; '.join([*against, *(f'expected {name}, and it is absent' for name in lacking)])}."
            f"{_of_prefix(wrong, absent)} Take weights of this architecture, or give the backbone "
            "the sizes that they are of"
        )
    model.load_state_dict(state, strict=False)


def _of_prefix(wrong: Sequence[str], absent: Collection[str]) -> str:
    """Says which prefix the names of weights have before those that a model has; "" for none."""
    prefix = os.path.commonprefix(wrong)
    prefix = prefix[: prefix.rfind(".") + 1]
    if not prefix or not any(name.removeprefix(prefix) in absent for name in wrong):
        return ""
    return (
        f" Names in the file begin with {prefix!r}, which a wrapper of the model left there: save "
        f"them without it, {{name.removeprefix({prefix!r}): tensor}}."
    )


# DeiT III calls its layer scale gamma_1 and gamma_2, no other ViT does
_convert_vit = partial(checkpoint_filter_fn, adapt_layer_scale=True)


def _resampled_positions(
    model: VisionTransformer, state: dict[str, Tensor], origin: str, grid: tuple[int, int] | None
) -> Tensor | None:
    """Takes the positions out of `state` and resamples them to the grid of `model`, as timm does.

    Returns None where there are none, or none that fit the model's width: then they stay.
    """
    positions, ours = state.get("pos_embed"), model.pos_embed
    if positions is None or ours is None or positions.shape[-1] != ours.shape[-1]:
        return None
    new_grid = tuple(model.patch_embed.grid_size)
    prefix = ours.shape[1] - math.prod(new_grid)  # rows of class token and registers
    count = positions.shape[1] - prefix
    old_grid = grid or _grid_of_positions(model, state, count)
    if old_grid is None:
        side = math.isqrt(max(count, 0))
        choices = [f"({r}, {count // r})" for r in range(2, side + 1) if count % r == 0]
        raise ValueError(
            f"weights of {origin} have {count} positions, and nothing says how many rows and "
            f"columns they are of: set backbone.grid, {' or '.join(choices) or 'if it is one'}, or "
            "with rows and columns exchanged (compress: --grid 4 4; its page: -p patch_grid 4,4)"
        )
    if math.prod(old_grid) != count:
        raise ValueError(
            f"weights of {origin} have {count} positions, which are not a grid of "
            f"{old_grid[0]} x {old_grid[1]}: set backbone.grid to rows and columns that are"
        )
    del state["pos_embed"]
    return resample_abs_pos_embed(
        positions, new_size=new_grid, old_size=old_grid, num_prefix_tokens=prefix
    )


def _grid_of_positions(
    model: VisionTransformer, state: dict[str, Tensor], count: int
) -> tuple[int, int] | None:
    """Tells rows and columns of `count` positions: those that the architecture was trained with if
    they make up this number, or a square if there is no other grid; else None."""
    kernel = state.get("patch_embed.proj.weight", model.patch_embed.proj.weight).shape[-2:]
    size = model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    trained = tuple(pixels // patch for pixels, patch in zip(size, kernel, strict=True))
    if math.prod(trained) == count:
        return trained
    side = math.isqrt(max(count, 0))
    no_other = side**2 == count and all(count % rows for rows in range(2, side))
    return (side, side) if no_other else None


def square_grid(model: nn.Module, image_size: int) -> tuple[int, int] | None:
    """Computes the grid of a model on square images; None for one without patches."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return None if patch is None else (image_size // patch[0], image_size // patch[1])


def _has_fixed_input_size(name: str) -> bool:
    """Says whether an architecture is built for one input size; convolutional ones are not."""
    module = timm.model_entrypoint(name).__module__
    return any(kind in module for kind in ("vision_transformer", "deit", "beit", "swin"))
