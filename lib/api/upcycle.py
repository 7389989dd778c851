"""Swaps MLPs of a model for MoE layers, in a copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..models import upcycle as layers
from ..models.modes import ambient_modes_off
from ..models.moe import moe_layers
from ..spec import MoESpec
from .modules import note, to_change


def upcycle(
    model: nn.Module,
    spec: MoESpec | None = None,
    *,
    modules: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    generator: torch.Generator | None = None,
    inplace: bool = False,
    **fields: Any,
) -> nn.Module:
    """Swaps the MLPs of the last `layers` blocks, or of `blocks`, for MoE layers.

        lib.upcycle(model, layers=2, experts=8)
        lib.upcycle(model, MoESpec(layers=2, experts=8))

    Raises ValueError for `members`, which make an ensemble. With fields the function stays as it is
    until it is trained, or a warning says what changes it. Returns the changed model; the given one
    is left as it is unless `inplace`; a caller's modes are left inside as in `prune`.
    `model.upcycling` gets a row a layer. What is taken, what the gate is, and what is refused: see
    `lib.models.upcycle.upcycle`, which does it.
    """
    members = fields.get("members", 1) if spec is None else spec.members
    if members != 1:
        raise ValueError(
            f"members={members} is for runs, which make an ensemble: upcycle makes one model, so "
            "leave it out"
        )
    with ambient_modes_off():  # no decorator, since warnings name the caller's line
        mixed = to_change(model, inplace, "upcycling")
        before = moe_layers(mixed)
        layers.upcycle(mixed, spec, modules=modules, ignore=ignore, generator=generator, **fields)
    rows = [
        {"layer": name, "experts": layer.router.experts, "shared": layer.shared is not None}
        for name, layer in moe_layers(mixed).items()
        if name not in before
    ]
    return note(mixed, "upcycling", rows)
