"""Experts: E two-layer MLPs in stacked weights, and one forward that does no more work than its assignments need.

Axis letters: **T** tokens, **A** assignments, **D** width, **H** expert hidden width, **E** experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routing import Routing


class Experts(nn.Module):
    """Stacked MLPs: `fc1.weight` (E, H, D), `fc1.bias` (E, H), `fc2.weight` (E, D, H), `fc2.bias` (E, D).

    The biases carry names that end in `.bias`, since timm's parameter groups exempt only such names from weight decay
    when a bias has two axes. An expert that gets no token has a zero gradient, not none: AdamW still decays its weights and
    applies its momentum, as it does for every weight of a dense layer (tested).
    """

    def __init__(self, experts: int, width: int, hidden: int, act: nn.Module | None = None):
        super().__init__()
        self.experts, self.width, self.hidden = experts, width, hidden
        self.act = act if act is not None else nn.GELU()
        self.fc1 = _Stack(experts, hidden, width)
        self.fc2 = _Stack(experts, width, hidden)

    @classmethod
    def copies(cls, mlp: nn.Module, experts: int) -> Experts:
        """E copies of a timm `Mlp` with Linear fc1 and fc2 (sparse upcycling, 2212.05055)."""
        with torch.device("meta"):  # no initialisation that is overwritten at once, and no draw from the global generator
            out = cls(experts, mlp.fc1.in_features, mlp.fc1.out_features, mlp.act)
        for stack, linear in ((out.fc1, mlp.fc1), (out.fc2, mlp.fc2)):
            bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
            stack.weight = nn.Parameter(linear.weight.detach().repeat(experts, 1, 1))
            stack.bias = nn.Parameter(bias.detach().repeat(experts, 1))
        return out

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x: (T, D); returns (T, D): for each token the weighted sum over its assignments, zero if it has none."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        order = torch.argsort(routing.expert, stable=True)
        token, counts = routing.token[order], routing.load().tolist()
        by_token, each = torch.argsort(token, stable=True), _per_token(token, x.shape[0])
        x = x.to(dtype)
        rows = x.index_select(0, token) if each is None else _Take.apply(x, token, by_token, each)
        parts = rows.split(counts)
        # Cast whole stacks: autocast inside the loop would cast slice by slice and stack float32 gradients once more.
        # unbind once: indexing w[e] in the loop gives each backward step an E-fold zero-filled gradient (2x at E = 32).
        stacks = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        weights = zip(*(stack.to(dtype).unbind(0) for stack in stacks), strict=True)
        # A zero-row slice still runs: its empty products give the idle expert its zero gradient.
        done = [F.linear(self.act(F.linear(part, w1, b1)), w2, b2)
                for part, (w1, b1, w2, b2) in zip(parts, weights, strict=True)]
        weighted = torch.cat(done) * routing.weight[order].to(dtype).unsqueeze(1)
        if each is None:
            return torch.zeros_like(x).index_add(0, token, weighted)
        weighted = _Take.apply(weighted, by_token, torch.argsort(by_token), 1)
        return weighted if each == 1 else weighted.view(x.shape[0], each, self.width).sum(dim=1, dtype=dtype)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, width={self.width}, hidden={self.hidden}"


class _Stack(nn.Module):
    """E linear maps: weight (E, out, in), bias (E, out), each initialised like `nn.Linear`."""

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        bound = in_features ** -0.5
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, out_features).uniform_(-bound, bound))


def _per_token(token: Tensor, tokens: int) -> int | None:
    """How many of the (A,) assignments each of the T tokens has, or None if not all have as many (something was dropped)."""
    counts = torch.bincount(token, minlength=tokens)
    each = token.numel() // max(tokens, 1)
    return each if bool((counts == each).all()) else None


class _Take(torch.autograd.Function):
    """x[index] for an `index` that holds each row of x `each` times. The gradient is gathered in the order `back` and summed,
    where that of index_select is added row by row (4 to 8 % of a forward and backward pass on CPU)."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor, each: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.each = each
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.index_select(0, ctx.saved_tensors[0])
        grad = grad if ctx.each == 1 else grad.view(-1, ctx.each, grad.shape[1]).sum(dim=1)
        return grad, None, None, None
