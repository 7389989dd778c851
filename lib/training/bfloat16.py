"""bfloat16 on processors that cannot multiply it: the same numbers, at the speed of float32.

Where a processor has no vectors of 512 bits, torch multiplies bfloat16 in scalar code: a training
step of ViT-S took forty times as long as in float32. Hardware multiplies bfloat16 operands exactly,
sums in float32 and rounds once. So does the mode below, with float32 products of the same operands:
results differ from the hardware's in the order of sums only, and what is saved for the backward
pass is bfloat16 as it would be there.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..spec import RunSpec

_ATEN = torch.ops.aten
WRITING_PRODUCTS = frozenset((_ATEN.mm.out, _ATEN.addmm.out))
PRODUCTS = WRITING_PRODUCTS | frozenset(
    op.default
    for op in (
        _ATEN.mm,
        _ATEN.addmm,
        _ATEN.bmm,
        _ATEN.baddbmm,
        _ATEN.convolution,
        _ATEN.convolution_backward,
        # the last three are whole operations only under inference_mode
        _ATEN.linear,
        _ATEN.matmul,
        _ATEN.conv2d,
    )
)


def multiplies_bfloat16() -> bool:
    """Tells whether this processor has vectors for bfloat16: x86 with AVX-512, Arm with SVE."""
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))


class RoundedProducts(TorchDispatchMode):
    """Computes products of bfloat16 tensors in float32 and rounds them to bfloat16; all else is as
    it was.

    A backward pass needs it too: it multiplies. Attention must be written out
    (`backbone.write_out_attention`): a fused kernel keeps its products to itself.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        low_precision = func in PRODUCTS and any(
            isinstance(arg, Tensor) and arg.dtype is torch.bfloat16 for arg in args
        )
        if not low_precision:
            return func(*args, **kwargs)
        if func in WRITING_PRODUCTS:
            # the float32 copy of `out` is not the tensor that is to be written
            plain, others = func.overloadpacket.default, {**kwargs}
            out = others.pop("out")
            return out.copy_(self.__torch_dispatch__(plain, types, args, others))
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return tree_map_only(Tensor, Tensor.bfloat16, func(*args, **kwargs))


def in_hardware(spec: RunSpec) -> bool:
    """Tells whether the run's products are computed in the type that the spec names; else they are
    rounded to it."""
    return spec.dtype != "bfloat16" or spec.device != "cpu" or multiplies_bfloat16()


def products(spec: RunSpec) -> contextlib.AbstractContextManager:
    """Returns the mode for a run in bfloat16 on a processor that cannot multiply it; for all others
    one that changes nothing."""
    return contextlib.nullcontext() if in_hardware(spec) else RoundedProducts()
