"""The steps from a layer's clusters of tokens to its experts, as numbers that can be drawn (MoEE,
2505.15414, Figure 1).

Axis letters: **n** tokens, **D** width, **H** hidden width, **K** clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..routers.centroid import CentroidRouter


@dataclass(frozen=True)
class Steps:
    """variance: (K, H) of each neuron on each cluster. kept_neurons: (K, H) true where the
    cluster's expert has the neuron. routed_share: (K, K) share of a cluster's tokens (row) that the
    router sends to each expert (column)."""

    variance: np.ndarray
    kept_neurons: np.ndarray
    routed_share: np.ndarray


def extraction_steps(inputs: Tensor, hidden: Tensor, labels: np.ndarray, percent: float) -> Steps:
    """Computes what each cluster of a layer's tokens keeps, and where its tokens are routed.

    inputs: (n, D) and hidden: (n, H) of the tokens; labels: (n,) cluster of each, -1 for none, two
    clusters or more. percent: of a cluster's variance, which the shortest list of neurons holds.
    """
    cluster_of_token = torch.from_numpy(labels)
    members = [cluster_of_token == k for k in range(int(labels.max()) + 1)]
    variance = torch.stack([hidden[tokens].var(dim=0) for tokens in members])
    order = variance.argsort(dim=1, descending=True)
    share = variance.gather(1, order).cumsum(dim=1) / variance.sum(dim=1, keepdim=True)
    # (K, 1) neurons that do not reach the percentage yet: the shortest list has one more
    short = (share < percent / 100).sum(dim=1, keepdim=True)
    kept = torch.arange(order.shape[1]) <= short  # (K, H) by rank of the neuron
    kept_neurons = torch.zeros_like(variance, dtype=torch.bool).scatter(1, order, kept)
    means = torch.stack([inputs[tokens].mean(dim=0) for tokens in members])
    expert_of_token = CentroidRouter.of(means).scores(inputs).argmax(dim=1)
    routed = [torch.bincount(expert_of_token[m], minlength=len(members)) / m.sum() for m in members]
    return Steps(variance.numpy(), kept_neurons.numpy(), torch.stack(routed).numpy())
