"""What the functions of this room share: a copy of the model, rules out of words, and a list of
what was done."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from torch import nn

from ..spec import Spec
from ..spec.base import sentence
from .loaders import check_model


def to_change(model: nn.Module, inplace: bool) -> nn.Module:
    """Returns the model itself if it is changed in place, else a copy. ValueError as
    `check_model`."""
    check_model(model)
    return model if inplace else copy.deepcopy(model)


def note(model: nn.Module, attribute: str, rows: Sequence[dict[str, Any]]) -> nn.Module:
    """Adds rows to what a model tells of itself, a plain list of dicts; returns the model.

    The list is no part of the state dict, and a copy of the model has a copy of it.
    """
    setattr(model, attribute, [*getattr(model, attribute, ()), *rows])
    return model


def rules_of(spec: type[Spec], /, **fields: Any) -> Any:
    """Makes rules out of fields. Raises ValueError that says in one sentence what does not fit."""
    try:
        return spec(**fields)
    except ValidationError as error:
        raise ValueError(sentence(error)) from None


@contextmanager
def modes_kept(model: nn.Module | None) -> Iterator[None]:
    """Puts the mode (training or evaluation) of each module back at its end."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
