"""Rows of experts: tokens go to the rows of their experts, outputs come back to their tokens, and
rows are multiplied by stacked weights.

Axis letters: **T** tokens, **A** assignments (of a token to an expert), **R** rows that the
experts compute (A, and those that fill slices up), **D** width, **E** experts, **I** inputs and
**O** outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..routers.base import Routing


@dataclass(frozen=True)
class Rows:
    """Says which row computes which assignment; the rows of an expert are one slice.

    lengths: E lengths of the slices. token: (R,) the token of each row; rows that fill a slice up
    are copies of token 0. by_token: (A,) the assignments, as the Routing lists them, in the order
    of their tokens; None where they are listed so, one for each token. row: (A,) their rows in that
    order, and start: (T,) where those of a token begin; None where each has one.
    """

    lengths: list[int]
    token: Tensor
    by_token: Tensor | None
    row: Tensor
    start: Tensor | None

    @classmethod
    def of(cls, routing: Routing, tokens: int, multiple: int) -> Rows:
        """Sorts the assignments of T tokens by expert.

        multiple: the lengths of slices are rounded up to a multiple of it.
        """
        by_expert, counts = torch.argsort(routing.expert, stable=True), routing.load()
        row = torch.arange(len(by_expert), device=counts.device)
        one_each = len(row) == tokens and torch.equal(routing.token, row)
        token = by_expert if one_each else routing.token[by_expert]
        if multiple == 1:
            lengths = counts.tolist()
        else:
            padded = -(-counts // multiple) * multiple
            lengths, filling = padded.tolist(), padded - counts
            # The rows of an expert move down by as many rows as fill up the slices before it.
            row = row + (filling.cumsum(0) - filling).repeat_interleave(counts)
            token = row.new_zeros(sum(lengths)).index_copy(0, row, token)
        row_of_assignment = torch.empty_like(row).index_copy(0, by_expert, row)
        if one_each:  # and in their order
            return cls(lengths, token, None, row_of_assignment, None)
        by_token = torch.argsort(routing.token, stable=True)
        of_token = torch.bincount(routing.token, minlength=tokens)
        start = of_token.cumsum(0) - of_token
        return cls(lengths, token, by_token, row_of_assignment[by_token], start)

    def gather(self, x: Tensor) -> Tensor:
        """Gives each row the features of its token: (T, D) -> (R, D)."""
        if not torch.is_grad_enabled():
            return x.index_select(0, self.token)
        return _Gather.apply(x, self.token, self.row, self.start)

    def sum_by_token(self, outputs: Tensor, weight: Tensor) -> Tensor:
        """Sums the weighted outputs of each token over its assignments; zero if it has none.

        outputs: (R, D). weight: (A,), the factor of each assignment. Returns (T, D).
        """
        # Hard decisions have weights of 1, which need not be multiplied by.
        if not weight.requires_grad and bool((weight == 1).all()):
            weight = None
        elif self.by_token is not None:
            weight = weight.index_select(0, self.by_token)
        run = _SumByToken.apply if torch.is_grad_enabled() else _SumByToken.forward
        return run(outputs, weight, self.token, self.row, self.start)


class _Gather(Function):
    """Is x[token]; the gradient of a token is the sum of those of its rows."""

    @staticmethod
    def forward(x: Tensor, token: Tensor, row: Tensor, start: Tensor | None) -> Tensor:
        return x.index_select(0, token)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _SumByToken.apply(grad, None, *ctx.saved_tensors), None, None, None


class _SumByToken(Function):
    """Sums outputs, (R, D), over the rows of each token, times weight, (A,), if there is one.

    The gradient of a row is gathered from its token; autograd would add to zeros, row by row.
    """

    @staticmethod
    def forward(
        outputs: Tensor, weight: Tensor | None, token: Tensor, row: Tensor, start: Tensor | None
    ) -> Tensor:
        if start is None:
            rows = outputs.index_select(0, row)
            return rows if weight is None else rows * weight.unsqueeze(1)
        # One pass, which adds in float32 where rows are bfloat16.
        return F.embedding_bag(row, outputs, start, mode="sum", per_sample_weights=weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        outputs, weight, token, row, start = inputs
        by_weight = weight is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(outputs if by_weight else None, weight, token, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outputs, weight, token, row = ctx.saved_tensors
        rows, of_weight = grad.index_select(0, token), None
        if outputs is not None:
            of_weight = (rows * outputs).sum(dim=1).index_select(0, row)
        if weight is None and len(row) == len(token):
            return rows, of_weight, None, None, None
        # Rows that fill slices up are no token's: their factor is 0.
        factors = grad.new_ones(len(row)) if weight is None else weight
        factor_of_row = grad.new_zeros(len(token)).index_copy(0, row, factors)
        return rows * factor_of_row.unsqueeze(1), of_weight, None, None, None


class StackedProduct(Function):
    """Multiplies each slice of rows by the weight of its expert: (R, I) -> (R, O).

    weight: (E, O, I) and bias: (E, O), of any type; the product is in that of the rows. lengths: of
    the E slices, whose sum is R. Weights are cast, and gradients of the stacks written, expert by
    expert while they are in the processor's cache; autograd would stack gradients afterwards, one
    more pass over all weights. The gradient of an expert without rows is zero.
    """

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor, lengths: list[int]) -> Tensor:
        out, kind = rows.new_empty(len(rows), weight.shape[1]), rows.dtype
        parts = zip(rows.split(lengths), weight, bias.to(kind), out.split(lengths), strict=True)
        for inputs, w, b, into in parts:
            _write(into, torch.addmm, b, inputs, w.to(kind).t())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight, bias, ctx.lengths = inputs
        ctx.save_for_backward(rows, weight)
        ctx.type_of_bias = bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grads, inputs = grad.split(ctx.lengths), rows.split(ctx.lengths)
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            of_rows = torch.cat([g @ w.to(g) for g, w in zip(grads, weight, strict=True)])
            of_weight = torch.stack([g.t() @ x for g, x in zip(grads, inputs, strict=True)])
            of_bias = torch.stack([g.sum(0) for g in grads]).to(ctx.type_of_bias)
            return of_rows, of_weight.to(weight), of_bias, None
        of_rows, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_rows = torch.empty_like(rows)
            for g, w, into in zip(grads, weight, of_rows.split(ctx.lengths), strict=True):
                _write(into, torch.mm, g, w.to(g.dtype))
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            for g, x, into in zip(grads, inputs, of_weight, strict=True):
                _write(into, torch.mm, g.t(), x)
        if ctx.needs_input_grad[2]:
            of_bias = torch.stack([g.sum(0) for g in grads]).to(ctx.type_of_bias)
        return of_rows, of_weight, of_bias, None


def _write(into: Tensor, product: Callable[..., Tensor], *operands: Tensor) -> None:
    """Writes a product into a tensor, in its type."""
    if into.dtype == operands[0].dtype:
        product(*operands, out=into)
    else:
        into.copy_(product(*operands))
