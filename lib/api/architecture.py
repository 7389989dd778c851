"""The architecture of a model: timm's name and what builds it, or a class of one's own.

timm does not keep what a model was built with, so the arguments are read off the model, and are
right if what they build has the same modules, numbers and shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..models.backbone import NothingDrawn
from ..models.plain import WRAPPERS
from .structure import Entry, rebuild
from .traits import Traits, differences, take_settings, traits_of

SHOWN = 4  # differences that an error lists
_STAGES = ("stages", "layers")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Lists all tensors of a model by name: its state, and the buffers that a state leaves out."""
    state = dict(model.state_dict())
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} of the state are no tensors, which is all that a file holds: keep "
            "extra state in buffers"
        )
    return state | {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in state
    }


def architecture_of(
    model: nn.Module, structure: Mapping[str, Entry], arguments: Mapping[str, Any] | None
) -> Entry:
    """Describes what builds the unchanged model: {"timm": name, "arguments": ...}, {"class": name}.

    arguments: as they were given to timm.create_model; None reads them off the model. Raises
    ValueError if what they build, with the layers of `structure`, is not this model.
    """
    kind = type(model).__name__
    if kind in WRAPPERS:
        raise ValueError(f"a {kind} wraps a model: save {WRAPPERS[kind]} instead")
    name = _name_in_timm(model)
    if name is None:
        if arguments is not None:
            raise ValueError(
                f"arguments are those of timm.create_model, and a {kind} is no model of timm: "
                f"leave them out, and restore with restore(path, {kind}(...))"
            )
        return {"class": kind}
    if arguments is None:
        arguments = _arguments_of(model, created(name, {}))
    entry = {"timm": name, "arguments": dict(arguments)}
    advice = (
        "Give `arguments={...}` as they were given to timm.create_model; a model that was changed "
        "by hand since is saved as one of your own: put it into an nn.Module of your class, and "
        "restore with restore(path, YourClass())"
    )
    try:
        built = rebuild(created(name, arguments), structure)
    except ValueError as error:
        raise ValueError(f"{error}. {advice}") from None
    take_settings(built, traits_of(model))
    if wrong := mismatch(traits_of(model), tensors_of(model), built):
        raise ValueError(
            f"timm.create_model({name!r}, **{dict(arguments)}) does not build the given {kind}: "
            f"{listed(wrong)}. {advice}"
        )
    return entry


def created(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Creates a model of timm on the meta device: nothing is drawn, and no memory taken.

    Raises ValueError if timm has no such model or does not take the arguments.
    """
    given = {
        key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()
    }
    try:
        with torch.device("meta"), NothingDrawn(), torch.random.fork_rng(devices=[]):
            return timm.create_model(name, **given)
    except Exception as error:  # a constructor may raise whatever its layers raise
        raise ValueError(
            f"timm.create_model({name!r}, **{given}) fails here, with timm {timm.__version__}: "
            f"{error}"
        ) from error


def mismatch(traits: Traits, tensors: Mapping[str, Any], built: nn.Module) -> list[str]:
    """Says, a sentence each, where a built model is not the one with these traits and tensors.

    tensors: {name: anything with a shape}.
    """
    here = tensors_of(built)
    sentences = differences(traits, traits_of(built))
    for name in dict.fromkeys([*tensors, *here]):
        if name not in here:
            sentences.append(f"{name} is in the saved model alone")
        elif name not in tensors:
            sentences.append(f"{name} is in the built model alone")
        elif tuple(tensors[name].shape) != tuple(here[name].shape):
            sentences.append(
                f"{name} has the shape {tuple(tensors[name].shape)} in the saved model, "
                f"{tuple(here[name].shape)} here"
            )
    return sentences


def listed(sentences: Sequence[str]) -> str:
    """Joins the first few sentences, and counts the others."""
    rest = len(sentences) - SHOWN
    return "; ".join(sentences[:SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _name_in_timm(model: nn.Module) -> str | None:
    """Finds the name that timm builds such a model by, with its tag; None for other models."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture = cfg.get("architecture")
    if architecture is None or not type(model).__module__.startswith("timm."):
        return None
    if not timm.is_model(architecture):
        return None
    tagged = f"{architecture}.{cfg.get('tag')}"
    try:
        timm.get_pretrained_cfg(tagged)
    except RuntimeError:  # no tag, or one that somebody else gave
        return architecture
    return tagged


def images_built_for(model: nn.Module) -> str:
    """Says which images a model is built for, as far as its modules tell: 3 channels, 14 x 14."""
    channels, size = (_read(READERS[name], model) for name in ("in_chans", "img_size"))
    sides = size if isinstance(size, tuple) else (size, size)
    said = [f"{channels} channels"] if channels else []
    return ", ".join([*said, " x ".join(map(str, sides))] if size else said)


# ---- arguments, read off a model


def _arguments_of(model: nn.Module, default: nn.Module) -> dict[str, Any]:
    """Reads the arguments in which a model differs from the one that is built without any."""
    parameters = _parameters(model)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = {}
    for name, read in READERS.items():
        value = _read(read, model) if takes_all or name in parameters else None
        if value is not None and value != _read(read, default):
            arguments[name] = value
    return arguments


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).__init__).parameters


def _read(read: Callable[[Any], Any], model: nn.Module) -> Any:
    try:
        value = read(model)
    except (AttributeError, IndexError, TypeError, StopIteration):
        return None  # this kind of model has nothing of the sort
    if isinstance(value, nn.Module):
        return None  # made of an argument, and none itself
    return tuple(value) if isinstance(value, list | tuple) else value


def _stages(model: Any) -> Sequence[Any]:
    return next(getattr(model, name) for name in _STAGES if hasattr(model, name))


def _depth(model: Any) -> int | None:
    staged = any(hasattr(model, name) for name in _STAGES)
    return None if staged else len(model.blocks)


def _first_block(model: Any) -> Any:
    return next(iter(model.blocks))


def _heads(model: Any) -> Any:
    if any(hasattr(model, name) for name in _STAGES):
        return [stage.blocks[0].attn.num_heads for stage in _stages(model)]
    return _first_block(model).attn.num_heads


def _drop_path(model: nn.Module) -> float | None:
    chances = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    return max(chances, default=None)


def _in_channels(model: nn.Module) -> int:
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def _image_size(model: Any) -> Any:
    if hasattr(model, "tokens_spatial_shape"):  # Hiera
        sides = zip(model.tokens_spatial_shape, model.patch_stride, strict=True)
        return [tokens * stride for tokens, stride in sides]
    return next(m.img_size for m in model.modules() if hasattr(m, "img_size"))


def _width(model: Any) -> Any:
    """The width of the blocks, or of each stage (MaxViT, whose attribute is that of the last)."""
    if hasattr(model, "stages") and "embed_dim" not in _parameters(model):
        return _widths(model)[-len(model.stages) :]
    return model.embed_dim if hasattr(model, "embed_dim") else _widths(model)[0]


def _widths(model: Any) -> list[int]:
    return [info["num_chs"] for info in model.feature_info]


def _blocks_of_stages(model: Any) -> list[int]:
    ends = [-1, *model.stage_ends]
    return [end - before for before, end in pairwise(ends)]


def outputs_of(model: Any) -> int | None:
    """Counts the outputs of a model: of timm by its head, which may have been put on by hand."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    name = name[0] if isinstance(name, list | tuple) else name  # a distilled DeiT has two
    head = dict(model.named_modules()).get(name)
    if isinstance(head, nn.Linear):
        return head.out_features
    return 0 if isinstance(head, nn.Identity) else getattr(model, "num_classes", None)


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


# {argument of timm.create_model: how to read it off a model}. Hidden widths are not among them:
# the structure of a file says each.
READERS: dict[str, Callable[[Any], Any]] = {
    "num_classes": outputs_of,
    "in_chans": _in_channels,
    "img_size": _image_size,
    "patch_size": lambda model: model.patch_embed.patch_size,
    "embed_dim": _width,
    "dims": lambda model: _widths(model) if "dims" in _parameters(model) else None,
    "depth": _depth,
    "depth_token_only": lambda model: len(model.blocks_token_only),
    "stages": _blocks_of_stages,
    "depths": lambda model: [len(stage.blocks) for stage in _stages(model)],
    "num_heads": _heads,
    "global_pool": lambda model: model.global_pool,
    "class_token": lambda model: model.has_class_token,
    "reg_tokens": lambda model: model.num_reg_tokens,
    "no_embed_class": lambda model: model.no_embed_class,
    "pool_include_prefix": lambda model: model.pool_include_prefix,
    "pos_embed": lambda model: "none" if model.pos_embed is None else "learn",
    "dynamic_img_size": lambda model: model.dynamic_img_size,
    "pre_norm": lambda model: _is_there(model.norm_pre),
    "final_norm": lambda model: _is_there(model.norm) or _is_there(model.fc_norm),
    "fc_norm": lambda model: _is_there(model.fc_norm),
    "qkv_bias": lambda model: _first_block(model).attn.qkv.bias is not None,
    "proj_bias": lambda model: _first_block(model).attn.proj.bias is not None,
    "qk_norm": lambda model: _is_there(_first_block(model).attn.q_norm),
    "init_values": lambda model: _first_block(model).ls1.init_values,
    "drop_rate": lambda model: model.drop_rate,
    "drop_path_rate": _drop_path,
}
