"""All products of a layer's experts in one call of torch, where a graphics card has the kernel.

Axis letters: **R** rows, those of an expert one after the other, **E** experts, **I** inputs and
**O** outputs of a linear map.

On the CPU torch's grouped product is a loop, and no faster than the loop of `Experts`; that it
computes the same is tested there. It was not timed on a card.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# What torch's kernel asks for: this compute capability, bfloat16, and rows that begin at multiples
# of 16 bytes, which are 8 numbers.
CAPABILITY = (8, 0)
ALIGNED_NUMBERS = 8


def available(rows: Tensor, *weights: Tensor) -> bool:
    """Says whether grouped products can take rows (R, I) through stacked weights (E, O, I).

    Weights of experts of unequal width have two axes, and cannot.
    """
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    aligned = all(
        weight.ndim == 3 and not any(size % ALIGNED_NUMBERS for size in weight.shape[1:])
        for weight in weights
    )
    return aligned and torch.cuda.get_device_capability(rows.device) >= CAPABILITY


class GroupedProduct(Function):
    """Multiplies each slice of rows by the weight of its expert: (R, I) -> (R, O).

    weight: (E, O, I) and bias: (E, O), of any type; the product is in that of the rows. expert:
    (R,), sorted, the expert of each row. The gradient of an expert without rows is zero.
    """

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor, expert: Tensor) -> Tensor:
        ends = _ends(expert, len(weight))
        out = F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)
        return out.add_(bias.to(rows.dtype).index_select(0, expert))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight, bias, expert = inputs
        ctx.save_for_backward(rows, weight, expert)
        ctx.type_of_bias = bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, expert = ctx.saved_tensors
        ends, grad = _ends(expert, len(weight)), grad.contiguous()
        of_rows, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_rows = F.grouped_mm(grad, weight.to(grad.dtype), offs=ends)
        if ctx.needs_input_grad[1]:
            # the axis that is cut into slices is summed over: (O, R) times (R, I)
            of_weight = F.grouped_mm(grad.t(), rows, offs=ends).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            # added in float32: an expert may have thousands of rows
            sums = torch.zeros(weight.shape[:2], device=grad.device)
            of_bias = sums.index_add_(0, expert, grad.float()).to(ctx.type_of_bias)
        return of_rows, of_weight, of_bias, None


def _ends(expert: Tensor, experts: int) -> Tensor:
    """(E,) one past the last row of each expert, as torch asks for it."""
    return torch.bincount(expert, minlength=experts).cumsum(0).to(torch.int32)
