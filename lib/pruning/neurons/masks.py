"""Unstructured pruning: single weights become zero and stay so, and no layer gets smaller.

Axis letters: **E** experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...models.experts import Experts
from .groups import matrices_of, prunable, supported
from .scores import (
    Batches,
    Loss,
    cross_entropy,
    cut_size,
    scores_from_gradients,
    scores_from_gradients_by_expert,
)


def mask_weights(
    model: nn.Module,
    batches: Batches,
    share: float,
    *,
    batches_of_expert: Sequence[Batches] | None = None,
    parts: Sequence[str] | None = None,
    loss: Loss = cross_entropy,
) -> dict[str, Tensor]:
    """Zeroes the `share` of weights with the lowest (g w)^2 in each matrix fc1, fc2, qkv, proj.

    batches_of_expert: E lists of batches to score the experts on as `expert_scores` does; None:
    they are scored by what their router sends them. Returns masks by name, True where a weight
    stays, for `apply_masks` after each step of an optimiser. Raises ValueError as `neuron_scores`,
    `expert_scores` and `cut_size` do.
    """
    modules = prunable(model, parts)
    forced_experts: dict[str, Experts] = {}
    if batches_of_expert is not None:
        forced_experts = {name: m for name, m in modules.items() if isinstance(m, Experts)}
    others = {name: module for name, module in modules.items() if name not in forced_experts}
    scores: dict[str, Tensor] = {}
    if others:
        scores |= scores_from_gradients(model, others, matrices_of, _squares, batches, loss)
    if forced_experts:
        scores |= scores_from_gradients_by_expert(
            model, forced_experts, matrices_of, _squares, batches_of_expert, loss
        )
    masks = {}
    for name, score in scores.items():
        stays = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
        stays[score.flatten().argsort(stable=True)[: cut_size(score.numel(), share)]] = False
        masks[name] = stays.view(score.shape)
    apply_masks(model, masks)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zeroes again what `mask_weights` zeroed, since an optimiser's step moves it.

    Raises ValueError for the name of a mask that the model lacks.
    """
    weights = {
        matrix_name: weight
        for name, module in supported(model).items()
        for matrix_name, [weight] in matrices_of(name, module)
    }
    if unknown := set(masks) - set(weights):
        raise ValueError(
            f"the model has no {', '.join(sorted(unknown))}: masks go with the model they were "
            "made for"
        )
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask, 0.0)


def _squares(tensors: list[Tensor]) -> Tensor:
    """Squares each entry of a matrix, the only tensor of its set (see `matrices_of`)."""
    return tensors[0].square()
