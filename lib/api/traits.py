"""What a module computes beyond its weights: classes and plain attributes, which no state says.

Two models of equal names and shapes can be different functions: other heads, another top-k, another
activation. Their traits differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

# what a model may carry as information, which is no part of what it computes
INFORMATION = ("class_names", "preprocessing", "upcycling", "pruning", "extraction", "dropping")
INFORMATION += ("finetuning", "history")
# of training or of speed: taken over from the file where a freshly built model has another value
SETTINGS = ("p", "drop_prob", "fused_attn", "grad_checkpointing")
# of the mode, or read by initialisation alone
_WITHOUT_MEANING = ("training", "init_values", "weight_init_mode", "fix_init", "head_init_scale")

Traits = Mapping[str, Mapping[str, Any]]


def traits_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Lists class and plain attributes (numbers, words, lists of them, functions) of each module.

    Returns {module name: {"class": ..., attribute: value}}, in values that JSON knows.
    """
    return {name: dict(_traits(module, not name)) for name, module in model.named_modules()}


def _traits(module: nn.Module, is_root: bool) -> Iterator[tuple[str, Any]]:
    yield "class", type(module).__name__
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    if hooks:
        yield "hooks", hooks
    for name, value in vars(module).items():
        if name.startswith("_") or name in _WITHOUT_MEANING or (is_root and name in INFORMATION):
            continue
        if isinstance(value, FunctionType | BuiltinFunctionType):
            yield name, f"function {value.__qualname__}"
        elif _is_plain(value):
            yield name, json.loads(json.dumps(value))  # tuples become lists


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


def _differences_of(where: str, saved: Mapping[str, Any], built: Mapping[str, Any]) -> list[str]:
    if saved["class"] != built["class"]:
        return [f"{where} is a {saved['class']} in the saved model, a {built['class']} here"]
    return [
        f"{where}: {key} is {saved.get(key)!r} in the saved model, {built.get(key)!r} here"
        for key in dict.fromkeys([*saved, *built])
        # as text: NaN is not equal to itself
        if json.dumps(saved.get(key)) != json.dumps(built.get(key))
    ]
