"""Books the multiply-adds of a forward pass, product by product, and checks them against torch.

A product is booked as it is called, under the module that owns its weight. Torch's own counter runs
along: a product that was not booked is an error, never a gap.
"""

from __future__ import annotations

import math

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


class Ledger(TorchFunctionMode):
    """Books each product under the module that owns its weight, or that runs it if none does."""

    def __init__(self, twin: nn.Module):
        super().__init__()
        self.macs: dict[str, int] = {}
        self.attention: dict[str, int] = {}
        self.elements: dict[str, int] = {}
        self.root = type(twin).__name__
        self._owner = {
            id(p): name
            for name, module in twin.named_modules()
            for p in module.parameters(recurse=False)
        }
        self._running: list[str] = [""]
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
            module.register_forward_hook(lambda *_: self._running.pop() and None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "")
        given = list(args) + list((kwargs or {}).values())
        if kind == "linear":
            self._book(given[1], math.prod(out.shape) * given[0].shape[-1])
        elif kind == "conv2d":
            self._book(given[1], math.prod(out.shape) * math.prod(given[1].shape[1:]))
        elif kind in ("matmul", "__matmul__", "bmm", "mm"):
            self._book(given[1], math.prod(out.shape) * given[0].shape[-1])
        elif kind == "scaled_dot_product_attention":
            q, k, v = given[:3]
            self._book(None, math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        elif kind == "layer_norm":
            weight = (kwargs or {}).get("weight", args[2] if len(args) > 2 else None)
            self._add(
                self.elements, self._owner.get(id(weight), self._running[-1]), given[0].numel()
            )
        return out

    def _book(self, weight, macs: int) -> None:
        owner = self._owner.get(id(weight))
        if owner is None:
            self._add(self.attention, self._running[-1], macs)
        else:
            self._add(self.macs, owner, macs)

    @staticmethod
    def _add(book: dict[str, int], name: str, amount: int) -> None:
        book[name] = book.get(name, 0) + amount


def agree(ledger: Ledger, torch_count: FlopCounterMode) -> None:
    """Raises ValueError if torch's counter, which sees all products, saw some that have no row."""
    booked = sum(ledger.macs.values()) + sum(ledger.attention.values())
    if 2 * booked == torch_count.get_total_flops():
        return
    suspects = []
    for path, ops in torch_count.get_flop_counts().items():
        name = path.removeprefix(ledger.root).removeprefix(".")
        inside = sum(
            macs
            for book in (ledger.macs, ledger.attention)
            for owner, macs in book.items()
            if owner == name or owner.startswith(f"{name}.") or not name
        )
        if path != "Global" and 2 * inside != sum(ops.values()):
            suspects.append(
                f"{name or ledger.root} ({', '.join(str(op).removeprefix('aten.') for op in ops)})"
            )
    raise ValueError(
        f"products that cost.count cannot book, innermost last: {'; '.join(suspects)}. "
        "Add the function to Ledger in lib/measure/ledger.py, with a test against its formula"
    )
