"""Runs a model once to see its products, without data where that can be done.

Axis letters: **B** images, **N** tokens of an image, **D** width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from ..models.moe import MoELayer, moe_layers
from .ledger import Ledger


@dataclass(frozen=True)
class Given:
    """Holds what a model is run on: `images` of it, as it is called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    images: int
    name: str  # as an error names it

    def moved(self, place: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns args and kwargs with `place` applied to every tensor."""
        return tree_map_only(Tensor, place, (self.args, self.kwargs))


@dataclass(frozen=True)
class Seen:
    """Holds what a run of a model left behind."""

    twin: nn.Module  # with stands in the places of MoE layers
    layers: dict[str, MoELayer]  # by name, of the twin
    ledger: Ledger

    def tokens(self, name: str) -> int:
        """Counts the tokens of all images that came to an MoE layer."""
        return self.twin.get_submodule(name).tokens


class _Stand(nn.Module):
    """Stands in the place of an MoE layer: counts its tokens and runs its shared expert alone."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.shared, self.width, self.tokens = layer.shared, layer.experts.width, 0

    def forward(self, x: Tensor) -> Tensor:
        """Lets x, (B, ..., D) or (B, D, ...), through."""
        self.tokens += x.numel() // self.width
        return x if self.shared is None else self.shared(x)


def given_images(
    model: nn.Module, image_size: int | tuple[int, int] | None, images: int, example: Any
) -> Given:
    """Makes the input of a model, with nothing in it, or takes an example of it.

    Arguments as of `cost.count`. Raises ValueError unless one of image_size and example is given.
    """
    if (image_size is None) == (example is None):
        raise ValueError(
            f"image_size={image_size} and example={'None' if example is None else '...'}: give one "
            "of them, the pixels of a side or (height, width), or what the model takes"
        )
    if example is None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        kind = {"device": "meta", "dtype": next(dtypes, torch.float32)}
        empty = torch.empty(images, channels, height, width, **kind)
        return Given((empty,), {}, images, f"image_size={image_size}")
    args = example if isinstance(example, tuple) else (example,)
    kwargs = {}
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or not tensors[0].ndim or images != 1:
        raise ValueError(
            f"example={type(example).__name__} with images={images}: its first tensor has B images "
            "on the first axis and tells their number; leave images out"
        )
    return Given(args, kwargs, len(tensors[0]), "this example")


def run(model: nn.Module, given: Given) -> Seen:
    """Runs a twin of a model on the meta device, or where the model lies if it needs data.

    Raises ValueError for images that it cannot take, or that are so large that their bytes cannot
    be counted.
    """
    try:
        return _run(model, given, lambda tensor: tensor.to("meta"))
    except Exception as error:  # whatever the code of a model may raise
        cause = error
    devices = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    if torch.device("meta") not in devices:
        try:
            return _run(model, given, lambda tensor: _filled(tensor, next(iter(devices))))
        except Exception as error:
            cause = error
    says = str(cause).splitlines()[0] if str(cause) else "it takes other sizes"
    raise ValueError(f"{type(model).__name__} does not run on {given.name}: {says}") from cause


def _run(model: nn.Module, given: Given, place: Callable[[Tensor], Tensor]) -> Seen:
    # Outside of inference mode, where an operation is not taken apart into its products.
    with torch.inference_mode(False), torch.no_grad():
        twin = _twin(model, place)
        layers = moe_layers(twin)
        for name, layer in layers.items():
            twin.set_submodule(name, _Stand(layer))
        args, kwargs = given.moved(place)
        ledger = Ledger(twin)
        # The math path writes attention as two plain products on every device.
        with sdpa_kernel(SDPBackend.MATH), ledger:
            twin(*args, **kwargs)
    return Seen(twin, layers, ledger)


def _twin(model: nn.Module, place: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copies a model, in evaluation mode, with `place` applied to every tensor: on the meta device
    all the structure and no memory."""
    memo = {id(p): nn.Parameter(place(p.detach()), requires_grad=False) for p in model.parameters()}
    attributes = (value for m in model.modules() for value in vars(m).values())
    tensors = [*model.buffers(), *(value for value in attributes if isinstance(value, Tensor))]
    memo |= {id(tensor): place(tensor.detach()) for tensor in tensors}
    return copy.deepcopy(model, memo).eval()


def _filled(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor; one without data gets small numbers, always the same, on a device."""
    if not tensor.is_meta:
        return tensor.clone()
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(device, tensor.dtype)
