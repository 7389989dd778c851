"""The MoE layer and the tape that carries its decisions to whoever asked for them.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **K**
experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..routers.base import Router, Routing
from .experts import Experts


class RoutingTape:
    """Collects the `Routing` of each MoE layer of a model during one forward pass.

        with RoutingTape(model) as tape:
            logits = model(images)
        for name, routing in tape: ...

    Entries are keyed by module and hold live tensors. A second pass of one layer inside the same
    tape (gradient checkpointing runs the forward again in backward) is ignored if the tape is
    closed by then, else it replaces the entry. Without an open tape a layer keeps nothing. A tape
    can be opened again: it starts empty. Passes in other threads than the one that opened it are
    not heard, but for those of a compiled model.

    A tape hears the very modules of its model. Where a layer did not run, because a copy of the
    model did, reading the tape is an error: a loss over no routing would be the number 0. It is one
    as well where gradients were on when the tape was opened, are on when it is read, and were off
    when the layer ran, as in reentrant checkpointing: a loss would be a constant.
    """

    def __init__(self, model: nn.Module):
        self._of = type(model).__name__
        # Order of definition in the model, so entries come out from the shallowest layer to the
        # deepest.
        self.layers = {layer: name for name, layer in moe_layers(model).items()}
        self._thread = 0
        self._entries: dict[MoELayer, Routing] = {}
        self._opened_with_gradients = False
        self._ran_with_gradients: dict[MoELayer, bool] = {}

    def __enter__(self) -> RoutingTape:
        busy = [name for layer, name in self.layers.items() if layer.tape is not None]
        if busy:  # looked for before any layer is touched: a refused tape leaves nothing behind
            raise RuntimeError(
                f"{', '.join(busy)} already writes to an open RoutingTape: close it first"
            )
        for layer in self.layers:
            layer.tape = self
        self._thread = get_ident()
        self._entries.clear()
        self._ran_with_gradients.clear()
        self._opened_with_gradients = torch.is_grad_enabled()
        return self

    def __getitem__(self, layer: MoELayer) -> Routing:
        """Looks up the Routing of one layer.

        Raises KeyError if it did not run under this tape, RuntimeError if it ran without gradients.
        """
        routing = self._entries[layer]
        self._check_gradients([layer])
        return routing

    def __exit__(self, *exc) -> None:
        for layer in self.layers:
            layer.tape = None

    def write(self, layer: MoELayer, routing: Routing) -> None:
        """Takes in the Routing of one layer; called by the layer.

        Raises RuntimeError for a copy of a layer, as replicas are that run on other devices.
        """
        if layer not in self.layers:
            raise RuntimeError(
                f"a copy of an MoE layer writes to the RoutingTape of a {self._of}, which cannot "
                "tell its place: replicas of nn.DataParallel are such copies. Run the model itself "
                "on one device, or a process a device with DistributedDataParallel"
            )
        # torch.compile cannot trace the question
        if not torch.compiler.is_compiling() and get_ident() != self._thread:
            return
        self._entries[layer] = routing
        self._ran_with_gradients[layer] = torch.is_grad_enabled()

    def __iter__(self) -> Iterator[tuple[str, Routing]]:
        """Yields (name, Routing) of each MoE layer, from the input of the model on.

        Raises RuntimeError where one did not run while the tape was open, or ran without gradients.
        """
        silent = [name for layer, name in self.layers.items() if layer not in self._entries]
        if silent:
            ran = [name for layer, name in self.layers.items() if layer in self._entries]
            raise RuntimeError(
                f"the RoutingTape of a {self._of} has nothing of {', '.join(silent)}; while it was "
                f"open there ran {', '.join(ran) or 'none of its MoE layers'}. Run this very model "
                "inside `with`, in the same thread, not a copy of it (copy.deepcopy, an average of "
                "weights) and not one whose layers were replaced since"
            )
        self._check_gradients(self.layers)
        return ((name, self._entries[layer]) for layer, name in self.layers.items())

    def _check_gradients(self, layers: Iterable[MoELayer]) -> None:
        """Raises RuntimeError if who reads may want gradients that these layers did not record."""
        if not (self._opened_with_gradients and torch.is_grad_enabled()):
            return
        lost = [self.layers[layer] for layer in layers if not self._ran_with_gradients[layer]]
        if lost:
            raise RuntimeError(
                f"{', '.join(lost)} of a {self._of} ran without gradients under a RoutingTape that "
                "was opened with them, so a loss of this routing would have none: reentrant "
                "gradient checkpointing does that. Pass use_reentrant=False to "
                "torch.utils.checkpoint (timm: timm.layers.set_reentrant_ckpt(False)). Where no "
                "gradient is wanted, open the tape, or read it, under torch.no_grad()"
            )

    def replace(self, routings: Sequence[Routing]) -> None:
        """Puts others in the place of all routings, from the input of the model on: those of the
        whole batch, where this process has seen a share of it."""
        self._entries = dict(zip(self.layers, routings, strict=True))

    def routings(self) -> list[Routing]:
        """Lists the routings alone, from the input of the model on."""
        return [routing for _, routing in self]


class MoELayer(nn.Module):
    """Puts a router, experts and an optional shared expert in the place of an MLP.

    Without shared expert y = sum_k w_k E_k(x); with it y = E_s(x) + sum_k w_k E_k(x) (ViMoE, eqs 4
    and 5). dropout: chance that an image passes the layer without its routed experts, in training.
    Input and output: (B, ..., D); the axes between are tokens (one axis in a ViT, two in Swin and
    ConvNeXt); with channels_first they are (B, D, ...), as those of a convolution.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        dropout: float = 0.0,
        channels_first: bool = False,
    ):
        super().__init__()
        self.router, self.experts, self.shared, self.dropout = router, experts, shared, dropout
        self.channels_first = channels_first
        self.tape: RoutingTape | None = None
        self.off = False  # see `without_experts`

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy takes along: an open tape goes on with the original alone."""
        return self.__dict__ | {"tape": None}

    def forward(self, x: Tensor) -> Tensor:
        """Runs x, (B, ..., D), to the same shape; hands the Routing to the open tape, if any."""
        last = x.movedim(1, -1) if self.channels_first else x  # (B, ..., D)
        b, d = last.shape[0], last.shape[-1]
        tokens = last.reshape(b, math.prod(last.shape[1:-1]), d)  # -1 fails for an empty batch
        routing = self.decide(tokens)
        if self.tape is not None:
            self.tape.write(self, routing)
        if self.off:
            return torch.zeros_like(x) if self.shared is None else self.shared(x)
        if self.training and self.dropout:
            # Whole images, (B,), so that attention must do without.
            passes = torch.rand(b, device=x.device) >= self.dropout
            image_of_assignment = routing.token // tokens.shape[1]
            routing = replace(routing, weight=routing.weight * passes[image_of_assignment])
        out = self.serve_images(tokens, routing, last.shape)
        out = out.movedim(-1, 1) if self.channels_first else out
        return out if self.shared is None else out + self.shared(x)

    def decide(self, tokens: Tensor) -> Routing:
        """Decides on tokens, (B, N, D); the Routing goes to the tape."""
        return self.router(tokens)

    def serve_images(self, tokens: Tensor, routing: Routing, shape: torch.Size) -> Tensor:
        """Carries out a Routing: tokens, (B, N, D) -> (B, ..., D), which is `shape`."""
        return self.serve(tokens.reshape(-1, tokens.shape[-1]), routing).view(shape)

    def serve(self, rows: Tensor, routing: Routing) -> Tensor:
        """Carries out a Routing: rows, (T, D) -> (T, D)."""
        return self.router.serve(self.experts, rows, routing)


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Lists the MoE layers of a model by name, in the order of definition."""
    return {name: part for name, part in model.named_modules() if isinstance(part, MoELayer)}


@contextmanager
def without_experts(model: nn.Module) -> Iterator[None]:
    """Switches the routed experts of every MoE layer off inside: attention and shared experts are
    left."""
    layers = moe_layers(model).values()
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False
