"""What a module computes beyond its weights: classes and plain attributes, which no state says.

Two models of equal names and shapes can be different functions: other heads, another top-k, another
activation. Their traits differ.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..inputs.weights import sha256_state

# what a model may carry as information, which is no part of what it computes
INFORMATION = ("class_names", "preprocessing", "upcycling", "pruning", "extraction", "dropping")
INFORMATION += ("finetuning", "history")
# of training, of speed, or told by shapes already (num_classes, which is not that of a head put on
# by hand): taken over from the file where a freshly built model has another value
SETTINGS = ("p", "drop_prob", "fused_attn", "grad_checkpointing", "num_classes")
# what timm knows of weights, which differs between its versions
_OF_TIMM = ("pretrained_cfg", "default_cfg")
# of the mode, or read by initialisation alone
_WITHOUT_MEANING = ("training", "init_values", "weight_init_mode", "fix_init", "head_init_scale")

Traits = Mapping[str, Mapping[str, Any]]


def traits_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Lists class and plain attributes (numbers, words, lists and dicts of them, tensors,
    functions) of each module.

    Returns {module name: {"class": ..., attribute: value}}, in values that JSON knows.
    """
    return {name: dict(_traits(module, not name)) for name, module in model.named_modules()}


def _traits(module: nn.Module, is_root: bool) -> Iterator[tuple[str, Any]]:
    yield "class", type(module).__name__
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    if hooks:
        yield "hooks", hooks
    for name, value in vars(module).items():
        if name.startswith("_") or name in _WITHOUT_MEANING:
            continue
        if is_root and name in INFORMATION and not is_own(module, name):
            continue
        if isinstance(value, FunctionType | BuiltinFunctionType):
            yield name, f"function {value.__qualname__}"
        elif isinstance(value, Tensor):
            yield name, {"shape": list(value.shape), "type": str(value.dtype)} | _numbers(value)
        elif _is_plain(value) or (name not in _OF_TIMM and _is_plain_dict(value)):
            yield name, json.loads(json.dumps(value))  # tuples become lists


def _numbers(tensor: Tensor) -> dict[str, str]:
    """The SHA-256 of a tensor's numbers; none on the meta device, which has none."""
    return {} if tensor.is_meta else {"sha256": sha256_state({"": tensor})}


def _is_plain_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not value or not all(map(_is_plain, value)):
        return False
    return all(_is_plain(inner) or _is_plain_dict(inner) for inner in value.values())


def is_own(model: nn.Module, name: str) -> bool:
    """Says whether a model has something of its own where information is kept: a module, say."""
    value = getattr(model, name, None)
    is_property = isinstance(getattr(type(model), name, None), property)
    return is_property or (value is not None and not isinstance(value, _kind_of(name)))


def told_by(model: nn.Module, name: str) -> Any:
    """Returns the information that a model carries under a name of `INFORMATION`; None if none."""
    value = getattr(model, name, None)
    return value if isinstance(value, _kind_of(name)) else None


def _kind_of(name: str) -> Any:
    return Mapping if name == "preprocessing" else list | tuple


def why_not_told(model: nn.Module) -> str | None:
    """Says which module has a forward that no file can tell of; None if there is none."""
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, MethodType):
            # a method of the class, chosen when the module was built, is there again in a new one
            of_class = getattr(type(module), forward.__name__, None) is forward.__func__
            forward = None if of_class and forward.__self__ is module else forward
        if isinstance(forward, MethodType | functools.partial):
            return (
                f"{name or 'the model'} ({type(module).__name__}) has a forward that was set on "
                "the module, and a file cannot tell what it computes: write it as the forward of a "
                "class, or delete it (del module.forward)"
            )
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def take_settings(model: nn.Module, traits: Traits) -> None:
    """Gives the modules of a model, in place, the `SETTINGS` that traits of the same names have."""
    for name, module in model.named_modules():
        of_module = traits.get(name, {})
        for setting in SETTINGS:
            if setting in of_module and setting in vars(module):
                setattr(module, setting, of_module[setting])


def differences(saved: Traits, built: Traits) -> list[str]:
    """Says, a sentence each, where the traits of a saved model and of a built one differ."""
    sentences = []
    for name in dict.fromkeys([*saved, *built]):
        where = name or "the model itself"
        if name not in built:
            sentences.append(f"{where} ({saved[name]['class']}) is in the saved model alone")
        elif name not in saved:
            sentences.append(f"{where} ({built[name]['class']}) is in the built model alone")
        else:
            sentences += _differences_of(where, saved[name], built[name])
    return sentences


def _same(one: Any, other: Any) -> bool:
    dicts = [value for value in (one, other) if isinstance(value, dict)]
    # Dicts and tensors are compared where both models have them: older files tell of none, and a
    # pass may leave one behind.
    if dicts and None in (one, other):
        return True
    if len(dicts) == 2 and "sha256" in one.keys() ^ other.keys():  # one is on the meta device
        one, other = ({k: v for k, v in d.items() if k != "sha256"} for d in dicts)
    return json.dumps(one) == json.dumps(other)  # as text: NaN is not equal to itself


def _differences_of(where: str, saved: Mapping[str, Any], built: Mapping[str, Any]) -> list[str]:
    if saved["class"] != built["class"]:
        return [f"{where} is a {saved['class']} in the saved model, a {built['class']} here"]
    return [
        f"{where}: {key} is {saved.get(key)!r} in the saved model, {built.get(key)!r} here"
        for key in dict.fromkeys([*saved, *built])
        if not _same(saved.get(key), built.get(key))
    ]
