"""Reads weights for a timm model from files under their publishers' names.

timm has a converter beside each architecture; it is used where there is one. Weights that bring
MoE layers are checked against those of the model.

Axis letters: **E** experts.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..inputs import weights
from ..spec import BackboneSpec, MoESpec

_OF_EXPERTS = re.compile(r"blocks\.(\d+)\.mlp\.experts\.fc2\.bias")  # (E, D)


def state_for(model: nn.Module, spec: BackboneSpec) -> dict[str, Tensor]:
    """Fetches the weights of a backbone as a state dict under the names of `model`.

    model: what `backbone.create` makes of the spec. Raises what `weights.fetch` raises, and
    ValueError, with the tensor and what was expected, where a file cannot be turned.
    """
    state = weights.fetch(spec.weights, spec.name)
    # `load_weights` turns those of a ViT itself, after it has resampled the positions
    if not spec.from_file or spec.brings_experts or isinstance(model, VisionTransformer):
        return state
    module = sys.modules[timm.model_entrypoint(spec.name).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    return state if convert is None else renamed(model, state, spec.weights, convert)


def grid_of(state: Mapping[str, Tensor], spec: BackboneSpec) -> tuple[int, int] | None:
    """Tells rows and columns of the positions in a state; None where nothing says so.

    That is the spec's grid, or a square where the publisher trained on square images alone.
    """
    squares = (spec.weights or "").startswith(("satmae:", "vmoe:"))
    if spec.grid is not None or not squares or "pos_embed" not in state:
        return spec.grid
    patches = state["pos_embed"].shape[1] - 1  # one is the class token's
    side = math.isqrt(patches)
    return (side, side) if side**2 == patches else None


def renamed(
    model: nn.Module,
    state: Mapping[str, Tensor],
    origin: str,
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Renames a state with timm's converter of an architecture.

    origin: where the state comes from, for the error. Raises ValueError for a tensor that the
    converter does not take.
    """
    try:
        return convert(dict(state), model)
    except Exception as error:  # converters assert nothing: they fail as their steps do
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name, tensor in state.items():
            try:
                convert({name: tensor}, model)
            except Exception:
                # flattened, so that only its name is turned
                [new_name] = _name_alone(name, tensor, model, convert)
                expected = shapes.get(new_name, "no such tensor")
                raise ValueError(
                    f"weights of {origin} do not fit {type(model).__name__}: {name} is "
                    f"{tuple(tensor.shape)}, expected {expected} (timm's name: {new_name}). Take "
                    "weights of this architecture, or give the backbone the sizes that they are of"
                ) from error
        raise


def _name_alone(name: str, tensor: Tensor, model: nn.Module, convert: Callable) -> list[str]:
    try:
        return list(convert({name: tensor.flatten()}, model))
    except Exception:  # the name leads nowhere
        return [name]


def experts_of_blocks(state: Mapping[str, Tensor]) -> dict[int, int]:
    """Reads E of each block that has experts, by its number, 1 at the input."""
    found = {name: _OF_EXPERTS.fullmatch(name) for name in state}
    return {int(match[1]) + 1: len(state[name]) for name, match in found.items() if match}


def check_experts(
    model: nn.Module, state: Mapping[str, Tensor], moe: MoESpec | None, origin: str
) -> None:
    """Raises ValueError unless a state has MoE layers where a spec has them, of the same E.

    model: before upcycling; not a ViT, it is refused. origin: where the state comes from, for the
    error.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"weights of {origin} are of a ViT, and the backbone is a {type(model).__name__}: name "
            "one of timm's vit_..."
        )
    theirs, ours = experts_of_blocks(state), {}
    if moe is not None:
        depth = len(model.blocks)
        blocks = moe.blocks or range(depth - moe.layers + 1, depth + 1)
        ours = dict.fromkeys(blocks, moe.experts)
    if ours != theirs:
        blocks = tuple(sorted(theirs))
        raise ValueError(
            f"weights of {origin} have {_said(theirs)}, and moe asks for {_said(ours)}: set "
            f"moe.layers={len(blocks)}, moe.blocks={blocks}, moe.experts={theirs[blocks[0]]}, or "
            "name other weights"
        )


def _said(experts: Mapping[int, int]) -> str:
    counts = sorted(set(experts.values()))
    blocks = ", ".join(map(str, sorted(experts)))
    return f"{' or '.join(map(str, counts))} experts in blocks {blocks}" if experts else "none"
