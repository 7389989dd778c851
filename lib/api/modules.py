"""What the functions of this room share: a copy of the model, rules out of words, and a list of
what was done."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from ..models.modes import ambient_modes_off
from ..models.plain import check_unwrapped, made_plain
from ..spec import Spec
from ..spec.base import sentence
from .loaders import check_model


def to_change(model: nn.Module, inplace: bool, noted: str | None = None) -> nn.Module:
    """Returns the model itself if it is changed in place, else a copy.

    noted: the attribute that `note` will write. Raises ValueError as `check_model`, for a wrapper
    (DataParallel, torch.compile), and where the model has something else of that name, before
    anything is computed.
    """
    check_model(model)
    check_unwrapped(model)
    own = None if noted is None else getattr(model, noted, None)
    if own is not None and not _is_note(own):
        raise ValueError(
            f"model.{noted} is a {type(own).__name__} of the model's own, and what is done here is "
            "noted under that name: give it another name, or put the model into a module of your "
            "own"
        )
    return model if inplace else copied(model)


@ambient_modes_off()
def copied(model: nn.Module) -> nn.Module:
    """Copies a model. Raises ValueError, by name, for a computed tensor that torch cannot copy."""
    for name, part in model.named_modules():
        for attribute, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ValueError(
                    f"{name or 'the model'} has a {attribute} that is computed from other "
                    f"parameters, and torch cannot copy it: {made_plain(attribute)}"
                )
    return copy.deepcopy(model)


def checked_seed(seed: Any) -> int:
    """Returns a seed, which may come out of numpy, as an int.

    Raises ValueError for what is no whole number from 0 to 2^63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: give a whole number of at least 0, below 2^63")
    return int(seed)


def note(model: nn.Module, attribute: str, rows: Sequence[dict[str, Any]]) -> nn.Module:
    """Adds rows to what a model tells of itself, a plain list of dicts; returns the model.

    The list is no part of the state dict, and a copy of the model has a copy of it.
    """
    setattr(model, attribute, [*(getattr(model, attribute, None) or ()), *rows])
    return model


def _is_note(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def rules_of(spec: type[Spec], /, **fields: Any) -> Any:
    """Makes rules out of fields. Raises ValueError that says in one sentence what does not fit."""
    try:
        return spec(**fields)
    except ValidationError as error:
        raise ValueError(sentence(error)) from None
