"""Ridge regression that makes up for removed neurons, and the choice of neurons with it in mind.

Axis letters: **n** tokens, **D** width of the output, **S** neurons, **K** clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS, BLOCK = 2048, 384  # tokens and neurons that moments are computed of at a time
ROUNDS = 4  # in which neurons go: what one is worth depends on which others are there


class Moments(NamedTuple):
    """Means and covariances of hidden activations and of a target, over tokens.

    mean_hidden: (S,). mean_target: (D,). covariance: (S, S) of the activations. cross_covariance:
    (S, D) of the activations with the target.
    """

    mean_hidden: Tensor
    mean_target: Tensor
    covariance: Tensor
    cross_covariance: Tensor

    def of_neurons(self, neurons: Tensor) -> Moments:
        """Picks some of the neurons, by index (S',)."""
        return Moments(
            self.mean_hidden[neurons],
            self.mean_target,
            self.covariance[neurons][:, neurons],
            self.cross_covariance[neurons],
        )

    def mixed_with(self, others: Moments, share: float) -> Moments:
        """Gives the covariances of `others` the weight `share` and these the rest; means stay."""
        return Moments(
            self.mean_hidden,
            self.mean_target,
            (1 - share) * self.covariance + share * others.covariance,
            (1 - share) * self.cross_covariance + share * others.cross_covariance,
        )


def moments_of(hidden: Tensor, target: Tensor) -> Moments:
    """Computes the moments of hidden (n, S) and target (n, D)."""
    mean_hidden, mean_target = hidden.mean(dim=0), target.mean(dim=0)
    neurons = len(mean_hidden)
    covariance = hidden.new_zeros(neurons, neurons)
    cross = hidden.new_zeros(neurons, len(mean_target))
    # centred piece by piece, so that no second copy of all rows is made
    for h, t in zip(hidden.split(ROWS), target.split(ROWS), strict=True):
        h = h - mean_hidden
        for i in range(0, neurons, BLOCK):  # of the symmetric matrix one half
            covariance[i : i + BLOCK, i:].addmm_(h[:, i : i + BLOCK].t(), h[:, i:])
        cross.addmm_(h.t(), t - mean_target)
    covariance = covariance.triu()
    covariance = (covariance + covariance.triu(1).t()) / len(hidden)
    return Moments(mean_hidden, mean_target, covariance, cross / len(hidden))


def moments_of_union(moments: Sequence[Moments], sizes: Tensor) -> Moments:
    """Computes the moments of all tokens from those of K clusters that make them up.

    sizes: (K,) tokens of each cluster.
    """
    shares = (sizes / sizes.sum()).tolist()
    mean_hidden, mean_target = (
        sum(share * part[i] for share, part in zip(shares, moments, strict=True)) for i in (0, 1)
    )
    covariance = torch.zeros_like(moments[0].covariance)
    cross = torch.zeros_like(moments[0].cross_covariance)
    for share, part in zip(shares, moments, strict=True):
        # covariance inside a cluster, and of its mean about the mean of all
        h = part.mean_hidden - mean_hidden
        covariance += share * torch.addr(part.covariance, h, h)
        cross += share * torch.addr(part.cross_covariance, h, part.mean_target - mean_target)
    return Moments(mean_hidden, mean_target, covariance, cross)


def ridge_regression(moments: Moments, penalty: float) -> tuple[Tensor, Tensor]:
    """Returns w2 (D, S) and b2 (D,) that predict the target from the activations best in squares.

    penalty: on the squared weights, in units of the mean variance of the neurons.
    """
    covariance = _penalised(moments, penalty)
    w2 = torch.linalg.solve(covariance, moments.cross_covariance.double()).t().float()
    return w2, moments.mean_target - w2 @ moments.mean_hidden


def _penalised(moments: Moments, penalty: float) -> Tensor:
    """(S, S) float64: the covariance with the penalty on its diagonal."""
    covariance = moments.covariance.to(torch.float64, copy=True)
    covariance.diagonal().add_(penalty * covariance.diagonal().mean().clamp_min(1e-12))
    return covariance


def keep_by_update(
    moments: Sequence[Moments],
    shares: Tensor,
    neurons: int,
    penalty: float,
    rounds: int = ROUNDS,
) -> list[Tensor]:
    """Keeps the neurons whose loss the others could make up for least; rising indices by cluster.

    moments: of K clusters, over all neurons. shares: (K,) of the tokens; [1] for one cluster.
    neurons: that stay, in the mean over tokens. penalty: as for `ridge_regression`.

    With weights W = C^-1 B for all neurons of a set, removing neuron j adds |W_j|^2 / (C^-1)_jj to
    the squared error, the others being fitted anew (Optimal Brain Surgeon, Hassibi and Stork 1993).
    The same proportion of the neurons goes in each round.
    """
    total = len(moments[0].covariance)
    problems = [(_penalised(part, penalty), part.cross_covariance.double()) for part in moments]
    kept_neurons = [torch.arange(total, device=shares.device) for _ in moments]
    for r in range(1, rounds + 1):
        added_errors = [
            _added_error(covariance[kept][:, kept], cross[kept])
            for (covariance, cross), kept in zip(problems, kept_neurons, strict=True)
        ]
        stay = round(total * (neurons / total) ** (r / rounds))
        best = share_out_neurons(added_errors, shares, stay)
        kept_neurons = [kept[index] for kept, index in zip(kept_neurons, best, strict=True)]
    return kept_neurons


def _added_error(covariance: Tensor, cross: Tensor) -> Tensor:
    """(S,) squared error that removing each neuron alone adds."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    return (inverse @ cross).square().sum(dim=1) / inverse.diagonal()


def share_out_neurons(scores: Sequence[Tensor], shares: Tensor, neurons: int) -> list[Tensor]:
    """Keeps the best neurons of all clusters together; rising indices by cluster.

    scores: of each cluster's neurons, (S,), such that they mean the same for a token of any
    cluster. shares: (K,) of the tokens. neurons: that a token passes in the mean, so a neuron costs
    its cluster's share of the tokens. Every cluster keeps one neuron at least.
    """
    sizes = [len(part) for part in scores]
    all_scores = torch.cat(list(scores))
    cluster_of_neuron = torch.repeat_interleave(torch.tensor(sizes, device=all_scores.device))
    order = all_scores.argsort(descending=True, stable=True)
    stays = torch.zeros(len(all_scores), dtype=torch.bool, device=all_scores.device)
    # 1e-9: shares such as 1/3 do not add up to whole numbers
    stays[order] = shares.double()[cluster_of_neuron[order]].cumsum(0) <= neurons + 1e-9
    kept_neurons = [part.nonzero()[:, 0] for part in stays.split(sizes)]
    return [
        kept if len(kept) else part.argmax().unsqueeze(0)
        for kept, part in zip(kept_neurons, scores, strict=True)
    ]
