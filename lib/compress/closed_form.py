"""What makes up for removed neurons in closed form: ridge regression on those that stay, and which ought to stay then.

Axis letters: **n** tokens, **D** width of the output, **S** neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 4  # in which neurons go: what one is worth depends on which others are there


class Moments(NamedTuple):
    """Of hidden activations and a target over tokens: means (S,) and (D,); about them, float64, the activations' covariance with
    the penalty on its diagonal (S, S), and the one with the target (S, D)."""

    mean: Tensor
    wanted: Tensor
    square: Tensor
    cross: Tensor


def moments(hidden: Tensor, target: Tensor, group: Tensor, everyone: Tensor, ridge: float, pooled: float = 0.0) -> Moments:
    """Of hidden (n, S) and target (n, D) on the tokens of a group, given by index. ridge: penalty, in units of the mean variance.

    With `pooled` = a, covariances are (1 - a) times the group's plus a times those of `everyone`, tokens by index, too.
    """
    def about_means(index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, t = hidden[index], target[index]
        mean_h, mean_t = h.mean(dim=0), t.mean(dim=0)
        h, t = h - mean_h, t - mean_t
        return mean_h, mean_t, h.t() @ h / len(index), h.t() @ t / len(index)

    mean_h, mean_t, square, cross = about_means(group)
    if pooled:
        _, _, every, both = about_means(everyone)
        square, cross = ((1 - pooled) * a + pooled * b for a, b in ((square, every), (cross, both)))
    square = square.double()
    square.diagonal().add_(ridge * square.diagonal().mean().clamp_min(1e-12))
    return Moments(mean_h, mean_t, square, cross.double())


def regression(found: Moments) -> tuple[Tensor, Tensor]:
    """w2 (D, S), b2 (D,) that predict the target from the activations, best in squares with the penalty."""
    w2 = torch.linalg.solve(found.square, found.cross).t().float()
    return w2, found.wanted - w2 @ found.mean


def survivors(found: Sequence[Moments], load: Tensor, count: int, rounds: int = ROUNDS) -> list[Tensor]:
    """Of each of K groups of tokens the rising indices of the neurons whose loss the others could make up for least: `count` in
    the mean over tokens. load: (K,) shares of the tokens; one group has load 1.

    With weights W = C^-1 B for all of a set, going without neuron j adds |W_j|^2 / (C^-1)_jj to the squared error, the others
    being fitted anew (Optimal Brain Surgeon, Hassibi and Stork 1993). In each of the rounds the same proportion goes.
    """
    whole = len(found[0].square)
    kept = [torch.arange(whole, device=load.device) for _ in found]
    for r in range(1, rounds + 1):
        costs = [_cost(part, own) for part, own in zip(found, kept, strict=True)]
        size = round(whole * (count / whole) ** (r / rounds))
        kept = [own[best] for own, best in zip(kept, shared_out(costs, load, size), strict=True)]
    return kept


def _cost(found: Moments, kept: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(found.square[kept][:, kept]))
    return (inverse @ found.cross[kept]).square().sum(dim=1) / inverse.diagonal()


def shared_out(scores: Sequence[Tensor], load: Tensor, count: int) -> list[Tensor]:
    """Of each group the rising indices of its best neurons, by scores that count for a token alike in all groups, so that a token
    passes `count` in the mean: a neuron costs what its group has of the tokens, load (K,). Each group keeps one at least."""
    whole = torch.cat(list(scores))
    group = torch.repeat_interleave(torch.tensor([len(s) for s in scores], device=whole.device))
    order = whole.argsort(descending=True, stable=True)
    inside = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
    inside[order] = load.double()[group[order]].cumsum(0) <= count + 1e-9
    chosen = [part.nonzero()[:, 0] for part in inside.split([len(s) for s in scores])]
    return [part if len(part) else s.argmax().unsqueeze(0) for part, s in zip(chosen, scores, strict=True)]
