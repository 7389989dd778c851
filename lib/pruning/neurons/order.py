"""Which groups stay if all layers are ranked in one order, instead of the same share in each.

Source: Leiden thesis, section 4, where the lowest weights go first until enough are gone.

What goes at once is a unit: a hidden neuron, or one dimension of every head of an attention, of its
Q and K and of its V and output map, since timm's heads have one size. The j-th unit of an attention
has the j-th lowest dimension of each head, in both sets, so its units rise by themselves. A unit
counts by its score for a single weight: the sum of the scores of its groups over the number of its
weights and biases.

Axis letters: **H** hidden width, **A** heads, **C** dimensions of a head, **U** units of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .scores import highest


def keep_in_one_order(
    scores: Mapping[str, Tensor], weights_of_group: Mapping[str, int], share: float
) -> dict[str, Tensor]:
    """Picks the groups that stay if, over all sets, the lowest `share` of the weights goes.

    scores: (H,) or (A, C) by name of a set. weights_of_group: as `groups.weights_of_groups`.
    Returns rising indices as `keep_indices` does, by name of a set. As many units go as come
    nearest to the share; the best unit of each layer (MLP, expert, attention) stays, so the share
    may be out of reach: then, and if a score is not finite, ValueError is raised.
    """
    layers: dict[str, list[str]] = {}
    for set_name in scores:
        layers.setdefault(_layer_of(set_name), []).append(set_name)
    sizes = {  # weights and biases of a unit
        layer: sum(weights_of_group[name] * scores[name][..., 0].numel() for name in set_names)
        for layer, set_names in layers.items()
    }
    ranks = {
        layer: sum(_sums_of_units(scores[name]) for name in set_names) / sizes[layer]
        for layer, set_names in layers.items()
    }
    going = _units_that_go(ranks, sizes, share)
    return {
        name: highest(scores[name], scores[name].shape[-1] - going[layer])
        for layer, set_names in layers.items()
        for name in set_names
    }


def _layer_of(set_name: str) -> str:
    """Names the layer whose units a set belongs to: both sets of an attention have the same."""
    return set_name.removesuffix(".qk").removesuffix(".vo")


def _sums_of_units(score: Tensor) -> Tensor:
    """Sums the j-th lowest scores over the heads of a set: (H,) or (A, C) -> rising (U,)."""
    return score.double().sort(dim=-1).values.reshape(-1, score.shape[-1]).sum(dim=0)


def _units_that_go(
    ranks: Mapping[str, Tensor], sizes: Mapping[str, int], share: float
) -> dict[str, int]:
    """Counts the units of each layer that go.

    ranks: rising (U,) scores for a weight, by layer. sizes: weights and biases of a unit, by layer.
    """
    candidates = {layer: rank[:-1].cpu() for layer, rank in ranks.items()}  # the best unit stays
    sizes_of_candidates = torch.cat(
        [torch.full((len(rank),), sizes[layer]) for layer, rank in candidates.items()]
    )
    all_weights = sum(sizes[layer] * len(rank) for layer, rank in ranks.items())
    if share * all_weights > sizes_of_candidates.sum() + max(sizes.values()) / 2:
        most = sizes_of_candidates.sum().item() / all_weights
        raise ValueError(
            f"share={share} is out of reach: each of {len(ranks)} layers keeps one neuron, or one "
            f"dimension of each head, so at most {most:.4g} of the weights can go"
        )
    order = torch.cat(list(candidates.values())).argsort(stable=True)
    gone = torch.cat([torch.tensor([0]), sizes_of_candidates[order].cumsum(0)])  # by units that go
    going = order[: int((gone.double() - share * all_weights).abs().argmin())]
    layer_of_candidate = torch.cat(
        [torch.full((len(rank),), i) for i, rank in enumerate(candidates.values())]
    )
    counts = layer_of_candidate[going].bincount(minlength=len(candidates)).tolist()
    return dict(zip(candidates, counts, strict=True))
