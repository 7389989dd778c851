"""Builds the model of a run: a timm model of the right input size, with its head and weights."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..inputs import weights
from ..routers.base import Router
from ..spec import BackboneSpec, MoESpec, RunSpec
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

    parent: final state of `spec.init`, in place of pretrained weights. Where the parent is dense,
    its weights are loaded before upcycling, which makes experts of its MLPs; where it has MoE
    layers, they are loaded after upcycling, which makes the layers that they fit. Of a masked
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
        if parent is not None:
            parent = _weights_for_child(parent, spec, model.pretrained_cfg["classifier"])
        parent_has_moe = spec.init is not None and spec.init.moe is not None
        if spec.init is None and spec.backbone.weights:
            pretrained = weights.fetch(spec.backbone.weights, spec.backbone.name)
            load_weights(model, pretrained, spec.backbone.weights)
        # a dense parent: before upcycling, since the experts are made of its MLPs
        if parent is not None and not parent_has_moe:
            model = model if fit is None else fit(model, parent)
            load_weights(model, parent, f"run {spec.init.id}")
        if spec.moe is not None:
            upcycle(model, spec.moe, generator)
        # a parent with experts: after upcycling, since a dense model has no place for them
        if parent is not None and parent_has_moe:
            model = model if fit is None else fit(model, parent)
            load_weights(model, _with_routers_of(model, parent), f"run {spec.init.id}")
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


def write_out_attention(model: nn.Module) -> None:
    """Makes timm's attention layers multiply and normalise step by step, without a fused kernel.

    On CPU the backward pass of torch's fused kernel is slow in bfloat16: it took half of a training
    step with heads of 16 channels, and a third with heads of 64 (`make bench` shows the ratio). The
    result differs by rounding only.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def _weights_for_child(state: dict[str, Tensor], spec: RunSpec, head: str) -> dict[str, Tensor]:
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
        return {name: tensor for name, tensor in state.items() if not name.startswith(f"{head}.")}
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
        near = timm.list_models(f"*{spec.name.split('_')[0]}*")[:5]
        raise ValueError(
            f"backbone name={spec.name!r} is not a timm model; near it: {', '.join(near) or 'none'}"
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


def skeleton(
    spec: BackboneSpec | str, image_size: int = 224, classes: int = 1000, moe: MoESpec | None = None
) -> nn.Module:
    """Creates a model on the meta device: shapes without memory, for counting and checking.

    spec: an architecture, or the name of a timm model.
    """
    spec = BackboneSpec(name=spec) if isinstance(spec, str) else spec
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = create(spec, image_size, classes, channels=3)
        return upcycle(model, moe) if moe is not None else model


def load_weights(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Copies `state` into `model`; timm resamples position embeddings of another resolution.

    The classifier head may differ or be absent: then the head of `model` stays. Raises ValueError
    at any other difference. origin: where the weights come from, for the error.
    """
    state = dict(state)
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model)
    model_state = model.state_dict()
    head = f"{model.pretrained_cfg['classifier']}."
    unfit = [
        name
        for name, tensor in state.items()
        if name not in model_state or model_state[name].shape != tensor.shape
    ]
    for name in unfit:
        if name.startswith(head):
            del state[name]
    wrong = [name for name in unfit if not name.startswith(head)]
    absent = [name for name in model_state if name not in state and not name.startswith(head)]
    if wrong or absent:
        raise ValueError(
            f"weights of {origin} do not fit {type(model).__name__}: "
            f"{len(wrong)} do not match (first {wrong[:3]}), "
            f"{len(absent)} are absent (first {absent[:3]})"
        )
    model.load_state_dict(state, strict=False)


def _has_fixed_input_size(name: str) -> bool:
    """Says whether an architecture is built for one input size; convolutional ones are not."""
    module = timm.model_entrypoint(name).__module__
    return any(kind in module for kind in ("vision_transformer", "deit", "beit", "swin"))
