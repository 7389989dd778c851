"""Books the multiply-adds of a forward pass, product by product, under the modules they belong to.

Products are seen where torch hands them to a device, so whatever a model calls (a layer, `@`,
einsum, attention) is booked by the rule that torch's own counter has for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Products of a vector, for which torch's counter has no rule: a multiply-add for each number of
# the matrix (or of the first vector), which stands at this place among the arguments.
OF_VECTORS = {aten.mv: 0, aten.addmv: 1, aten.dot: 0, aten.vdot: 0}
# Products of a matrix an image (and head). Where no factor is a parameter both depend on the image.
BATCHED = (aten.bmm, aten.baddbmm)


class Ledger(TorchDispatchMode):
    """Books each product under the module that owns its weight, or that runs it if none does.

    macs: multiply-adds by module. attention: likewise, where both factors depend on the image.
    elements: of the inputs of LayerNorms, by module. A weight is known by its memory, so its views
    are, too; one that was computed from parameters belongs to the module that runs the product. A
    parameter that several modules share belongs to the first. The hooks stay in `twin`.
    """

    def __init__(self, twin: nn.Module):
        super().__init__()
        self.macs: dict[str, int] = {}
        self.attention: dict[str, int] = {}
        self.elements: dict[str, int] = {}
        self._owner: dict[int, str] = {}
        for name, module in twin.named_modules():
            for parameter in module.parameters(recurse=False):
                self._owner.setdefault(_memory(parameter), name)
        self._running: list[str] = [""]
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
            module.register_forward_hook(lambda *_: self._running.pop() and None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = func.overloadpacket
        if kind not in flop_registry and kind not in OF_VECTORS and kind != aten.native_layer_norm:
            # An operation without a rule may be made of others that have one.
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        if kind == aten.native_layer_norm:
            owner = self._owner_among(args[2:3]) or self._running[-1]
            _add(self.elements, owner, args[0].numel())
        elif kind in OF_VECTORS:
            self._book(kind, args, args[OF_VECTORS[kind]].numel())
        else:
            # torch counts the two operations of a multiply-add apart
            self._book(kind, args, flop_registry[kind](*args, **kwargs, out_val=out) // 2)
        return out

    def _book(self, kind: Any, args: tuple[Any, ...], macs: int) -> None:
        # A weight is mostly the last factor, as in x @ w. Where it was computed, the bias that
        # addmm and convolution take along tells the owner; what attention adds is no such bias.
        factors = args[1:] if kind == aten.baddbmm else args
        owner = self._owner_among(reversed(factors))
        if owner is None and (kind in BATCHED or "attention" in str(kind)):
            _add(self.attention, self._running[-1], macs)
        else:
            _add(self.macs, self._running[-1] if owner is None else owner, macs)

    def _owner_among(self, args: Any) -> str | None:
        """Names the module that owns the first of these tensors that is a parameter."""
        tensors = (arg for arg in args if isinstance(arg, Tensor))
        owners = (self._owner.get(_memory(tensor)) for tensor in tensors)
        return next((owner for owner in owners if owner is not None), None)


def _memory(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, which its views share, on the meta device too."""
    return tensor.untyped_storage()._cdata


def _add(book: dict[str, int], name: str, amount: int) -> None:
    book[name] = book.get(name, 0) + amount
