"""A form of a model that other runtimes take: torch.export, ONNX, torch.compile without a break.

    torch.export.export(lib.for_export(model), (images,))

The routing of an MoE layer is a matter of shapes that depend on the data: how many tokens an expert
gets. In the form for export every expert runs on every token, and a token's outputs are weighed by
what the router decided, by 0 where it did not choose an expert.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.copies import WholeCopies
from ..models.modes import ambient_modes_off
from ..models.moe import MoELayer
from ..models.pruned import PrunedLayer
from .loaders import check_model


class StaticLayer(nn.Module):
    """Computes what an MoE layer computes at evaluation, by operations of fixed shapes.

    Input and output: (B, ..., D), or (B, D, ...) with channels first. E / K times the multiply-adds
    of the layer's experts.
    """

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.router, self.experts, self.shared = layer.router, layer.experts, layer.shared
        self.channels_first = layer.channels_first
        numbers = range(layer.router.experts)  # of the experts that are there
        if isinstance(layer, PrunedLayer):
            numbers = layer.kept.tolist()
        self.place = {expert: place for place, expert in enumerate(numbers)}  # in their stack
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Runs x to the same shape."""
        last = x.movedim(1, -1) if self.channels_first else x  # (B, ..., D)
        if isinstance(self.experts, WholeCopies):
            of_stack = [partial(self._whole_copy, mlp, last.shape) for mlp in self.experts.copies]
        else:
            of_stack = [partial(_expert, self.experts.act, *parts) for parts in self.experts.each()]
        experts: list[Callable[[Tensor], Tensor] | None] = [
            of_stack[self.place[e]] if e in self.place else None for e in range(self.router.experts)
        ]
        out = self.router.serve_all(experts, last.flatten(1, -2)).view(last.shape)
        out = out.movedim(-1, 1) if self.channels_first else out
        return out if self.shared is None else out + self.shared(x)

    def _whole_copy(self, mlp: nn.Module, shape: torch.Size, rows: Tensor) -> Tensor:
        """Runs a copy on whole images: rows, (T, D) -> (T, D). shape: (B, ..., D)."""
        images = rows.view(shape)
        if self.channels_first:
            return mlp(images.movedim(-1, 1)).movedim(1, -1).reshape(rows.shape)
        return mlp(images).reshape(rows.shape)


def _expert(act: nn.Module, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, x: Tensor) -> Tensor:
    return F.linear(act(F.linear(x, w1, b1)), w2, b2)


@ambient_modes_off()
def for_export(model: nn.Module) -> nn.Module:
    """Returns a copy of a model, in evaluation mode, that exporters can follow.

    Equal in output but for rounding, and slower than the model itself: every expert runs on every
    token, so what an extracted model saves is not saved there. Capacities, and pools of a whole
    batch, are those of the number of images that is traced. Names in the state stay as they are.

    Raises ValueError for what is no model and, by name, for a layer whose routing depends on more
    than its input.
    """
    check_model(model)
    copied = copy.deepcopy(model).eval()
    for name, layer in list(copied.named_modules()):
        if hasattr(layer, "fused_attn"):  # one kernel with a bias (BEiT) has no form in ONNX
            layer.fused_attn = False
        if not isinstance(layer, MoELayer):
            continue
        if reason := layer.router.not_exported:
            raise ValueError(f"{name or 'the layer'}: {reason}: it cannot be exported")
        if not name:  # the model is a layer itself
            return StaticLayer(layer)
        copied.set_submodule(name, StaticLayer(layer))
    return copied
