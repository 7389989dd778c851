"""What makes up for removed neurons in closed form: ridge regression on those that stay, and which
ought to stay then.

Axis letters: **n** tokens, **D** width of the output, **S** neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS, BLOCK = 2048, 384  # tokens and neurons that moments are made of at a time
ROUNDS = 4  # in which neurons go: what one is worth depends on which others are there


class Moments(NamedTuple):
    """Of hidden activations and a target over tokens: means (S,) and (D,); about them the
    activations' covariance (S, S), and the one with the target (S, D)."""

    mean: Tensor
    wanted: Tensor
    square: Tensor
    cross: Tensor

    def of(self, neurons: Tensor) -> Moments:
        """Of some of the neurons, by index."""
        return Moments(
            self.mean[neurons], self.wanted, self.square[neurons][:, neurons], self.cross[neurons]
        )

    def mixed(self, everyone: Moments, share: float) -> Moments:
        """Covariances are 1 - share times these plus share times `everyone`'s; means stay."""
        square, cross = (
            (1 - share) * a + share * b
            for a, b in ((self.square, everyone.square), (self.cross, everyone.cross))
        )
        return Moments(self.mean, self.wanted, square, cross)


def moments(hidden: Tensor, target: Tensor) -> Moments:
    """Of hidden (n, S) and target (n, D). Rows are centred piece by piece, so that no second copy
    of them is made, and of the symmetric matrix one half is computed."""
    mean, wanted = hidden.mean(dim=0), target.mean(dim=0)
    square, cross = hidden.new_zeros(len(mean), len(mean)), hidden.new_zeros(len(mean), len(wanted))
    for h, t in zip(hidden.split(ROWS), target.split(ROWS), strict=True):
        h = h - mean
        for i in range(0, len(mean), BLOCK):
            square[i : i + BLOCK, i:].addmm_(h[:, i : i + BLOCK].t(), h[:, i:])
        cross.addmm_(h.t(), t - wanted)
    square = square.triu()
    return Moments(mean, wanted, (square + square.triu(1).t()) / len(hidden), cross / len(hidden))


def pooled(parts: Sequence[Moments], sizes: Tensor) -> Moments:
    """Of all tokens, from the moments of groups that make them up. sizes: (K,) tokens of each
    group."""
    load = (sizes / sizes.sum()).tolist()
    mean, wanted = (sum(w * part[i] for w, part in zip(load, parts, strict=True)) for i in (0, 1))
    square, cross = torch.zeros_like(parts[0].square), torch.zeros_like(parts[0].cross)
    for w, part in zip(load, parts, strict=True):
        h = part.mean - mean
        square += w * torch.addr(part.square, h, h)
        cross += w * torch.addr(part.cross, h, part.wanted - wanted)
    return Moments(mean, wanted, square, cross)


def regression(found: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """w2 (D, S), b2 (D,) that predict the target from the activations, best in squares with a
    penalty: `ridge`, in units of the mean variance."""
    w2 = torch.linalg.solve(_penalised(found, ridge), found.cross.double()).t().float()
    return w2, found.wanted - w2 @ found.mean


def _penalised(found: Moments, ridge: float) -> Tensor:
    square = found.square.to(torch.float64, copy=True)
    square.diagonal().add_(ridge * square.diagonal().mean().clamp_min(1e-12))
    return square


def survivors(
    found: Sequence[Moments], load: Tensor, count: int, ridge: float, rounds: int = ROUNDS
) -> list[Tensor]:
    """Of each of K groups of tokens the rising indices of the neurons whose loss the others could
    make up for least: `count` in the mean over tokens. load: (K,) shares of the tokens; one group
    has load 1. ridge: as for `regression`.

    With weights W = C^-1 B for all of a set, going without neuron j adds |W_j|^2 / (C^-1)_jj to the
    squared error, the others being fitted anew (Optimal Brain Surgeon, Hassibi and Stork 1993). In
    each of the rounds the same proportion goes.
    """
    whole, parts = (
        len(found[0].square),
        [(_penalised(part, ridge), part.cross.double()) for part in found],
    )
    kept = [torch.arange(whole, device=load.device) for _ in found]
    for r in range(1, rounds + 1):
        costs = [
            _cost(square[own][:, own], cross[own])
            for (square, cross), own in zip(parts, kept, strict=True)
        ]
        size = round(whole * (count / whole) ** (r / rounds))
        kept = [own[best] for own, best in zip(kept, shared_out(costs, load, size), strict=True)]
    return kept


def _cost(square: Tensor, cross: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    return (inverse @ cross).square().sum(dim=1) / inverse.diagonal()


def shared_out(scores: Sequence[Tensor], load: Tensor, count: int) -> list[Tensor]:
    """Of each group the rising indices of its best neurons, by scores that count for a token alike
    in all groups, so that a token passes `count` in the mean: a neuron costs what its group has of
    the tokens, load (K,). Each group keeps one at least."""
    whole = torch.cat(list(scores))
    group = torch.repeat_interleave(torch.tensor([len(s) for s in scores], device=whole.device))
    order = whole.argsort(descending=True, stable=True)
    inside = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
    inside[order] = load.double()[group[order]].cumsum(0) <= count + 1e-9
    chosen = [part.nonzero()[:, 0] for part in inside.split([len(s) for s in scores])]
    return [
        part if len(part) else s.argmax().unsqueeze(0)
        for part, s in zip(chosen, scores, strict=True)
    ]
