"""Experts: E two-layer MLPs in stacked weights, and one forward that does no more work than its assignments need.

Axis letters: **T** tokens, **A** assignments, **D** width, **H** expert hidden width, **E** experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routing import Routing

# On CPU the library behind bfloat16 products builds a kernel for each new number of rows, which takes longer than the product.
# Slices of whole multiples meet few different numbers; the rows that fill them up are copies whose results nobody reads.
ALIGN = 16


class Experts(nn.Module):
    """Stacked MLPs: `fc1.weight` (E, H, D), `fc1.bias` (E, H), `fc2.weight` (E, D, H), `fc2.bias` (E, D).

    The biases carry names that end in `.bias`: timm's own rules go by that name or by the number of axes, and a stacked bias
    has two, so `train.optimiser` exempts it from weight decay by name. An expert that gets no token has a zero gradient, not
    none: AdamW still decays its weights and applies its momentum, as it does for every weight of a dense layer (tested).
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

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw all experts anew, each for itself, as timm's ViT draws its MLPs."""
        with torch.no_grad():
            for stack in (self.fc1, self.fc2):
                for weight in stack.weight:
                    nn.init.trunc_normal_(weight, std=0.02, generator=generator)
                stack.bias.zero_()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x: (T, D); returns (T, D): for each token the weighted sum over its assignments, zero if it has none."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        order = torch.argsort(routing.expert, stable=True)
        token, counts = routing.token[order], routing.load()
        low = dtype == torch.bfloat16
        slices, place = _aligned(counts, ALIGN if low else 1)
        source = token.new_zeros(sum(slices)).index_copy(0, place, token)
        rows = x.to(dtype).index_select(0, source).split(slices)
        # Cast whole stacks: autocast inside the loop would cast slice by slice and stack float32 gradients once more.
        # unbind once: indexing w[e] in the loop gives each backward step an E-fold zero-filled gradient (2x at E = 32).
        stacks = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        weights = zip(*(stack.to(dtype).unbind(0) for stack in stacks), strict=True)
        mlp = self._left if low and not torch.is_grad_enabled() else self._right
        # A zero-row slice still runs: its empty products give the idle expert its zero gradient.
        done = torch.cat([mlp(part, *own) for part, own in zip(rows, weights, strict=True)])
        return _sum_by_token(done, place, token, routing.weight[order].to(dtype), x.shape[0])

    def _right(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(self.act(F.linear(x, w1, b1)), w2, b2)

    def _left(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        """The same with the weights on the left of each product: the right-hand side is what gets packed in bfloat16, and there
        are fewer rows than weights. With a backward pass nothing is gained by it."""
        return torch.addmm(b2.unsqueeze(1), w2, self.act(torch.addmm(b1.unsqueeze(1), w1, x.t()))).t()

    def extra_repr(self) -> str:
        return f"experts={self.experts}, width={self.width}, hidden={self.hidden}"


class _Stack(nn.Module):
    """E linear maps: weight (E, out, in), bias (E, out), each initialised like `nn.Linear`."""

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        bound = in_features ** -0.5
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, out_features).uniform_(-bound, bound))


def _aligned(counts: Tensor, step: int) -> tuple[list[int], Tensor]:
    """Slice lengths for (E,) counts, rounded up to multiples of `step`, and the (A,) places of the real rows in them."""
    slices = -(-counts // step) * step
    shift = (slices - counts).cumsum(0) - (slices - counts)
    place = torch.arange(int(counts.sum()), device=counts.device) + shift.repeat_interleave(counts)
    return slices.tolist(), place


def _sum_by_token(rows: Tensor, place: Tensor, token: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """rows: (S, D) of which the (A,) `place` are real, token: (A,) their tokens, weight: (A,) their factors; returns the (T, D)
    weighted sums, zero for a token without rows."""
    by_token = torch.argsort(token, stable=True)
    each, rest = divmod(token.numel(), max(tokens, 1))
    if not rest and torch.equal(token[by_token], torch.arange(tokens, device=token.device).repeat_interleave(each)):
        # Nothing dropped: a gather and a short sum, since index_add walks row by row on CPU.
        rows = rows.index_select(0, place[by_token]) * weight[by_token].unsqueeze(1)
        return rows if each == 1 else rows.view(tokens, each, rows.shape[1]).sum(dim=1, dtype=rows.dtype)
    rows = rows.index_select(0, place) * weight.unsqueeze(1)
    return rows.new_zeros(tokens, rows.shape[1]).index_add(0, token, rows)
