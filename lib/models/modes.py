"""Modes kept over what changes them: those of a model's modules, and those that torch has around a
call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

_WITH_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # kinds of devices


@contextmanager
def modes_kept(model: nn.Module | None) -> Iterator[None]:
    """Puts the mode of each module back at its end."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def ambient_modes_off() -> Iterator[None]:
    """Leaves, inside, the modes of torch that a caller has on: autocast, inference_mode, no_grad.

    Statistics and regressions would lose precision under the first, and tensors that are made under
    the second can never be trained.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for on in autocasts():
            modes.enter_context(torch.autocast(on.device, enabled=False))
        yield


def autocasts() -> list[torch.autocast]:
    """Lists the autocasts that are on here, one a kind of device, to be entered elsewhere."""
    return [
        torch.autocast(kind, torch.get_autocast_dtype(kind))
        for kind in _WITH_AUTOCAST
        if torch.is_autocast_enabled(kind)
    ]
