"""Pruning of a model by a set of rules: scores, the groups that stay, removal.

Axis letters: **B** images, **E** experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...routers.manual import labelled
from ...spec import PruneSpec
from .groups import parts_in, supported, weights_of_groups
from .order import keep_in_one_order
from .removal import remove
from .scores import Batches, Loss, expert_scores, highest, keep_indices, neuron_scores

# (name of a set, its groups, as many as the rules leave) -> as many as stay
Resize = Callable[[str, int, int], int]


def labelled_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Computes the mean cross-entropy of a batch; manual routers are told its classes."""
    with labelled(model, labels):  # the warm-up of experts routes by class
        return F.cross_entropy(model(images), labels)


def prune(
    model: nn.Module,
    rules: PruneSpec,
    balanced: Batches,
    *,
    of_experts: Sequence[Batches] | None = None,
    generator: torch.Generator,
    loss: Loss = labelled_loss,
    ignore: Collection[str] = (),
    modules: Sequence[str] | None = None,
    resize: Resize | None = None,
) -> nn.Module:
    """Removes neurons and head dimensions, in place, as structured rules say; returns the model.

    Experts go first, then the rest, scored on what is left of the experts. balanced: calibration
    batches. of_experts: E lists of batches, each forced through its expert; None: experts are
    scored by what their router sends them. ignore: names of layers that stay whole. modules:
    patterns of MLPs to take instead of the blocks' own. resize: changes
    how many groups stay. Raises ValueError as the scores and `remove` do.
    """
    options = {"kind": rules.kind, "loss": loss, "generator": generator}
    for pool in pools(model, rules):
        if pool == ("experts",) and of_experts is not None:
            scores = expert_scores(model, of_experts, **options)
        else:
            scores = neuron_scores(
                model, balanced, parts=pool, ignore=ignore, modules=modules, **options
            )
        remove(model, groups_that_stay(model, rules, scores, resize))
    return model


def parts_of(model: nn.Module, rules: PruneSpec) -> tuple[str, ...]:
    """Lists the parts that are pruned: those asked for, else all that the model has."""
    return parts_in(model) if rules.parts is None else rules.parts


def pools(model: nn.Module, rules: PruneSpec) -> list[tuple[str, ...]]:
    """Lists the parts that are pruned together, in the order in which they are pruned."""
    parts = parts_of(model, rules)
    both = ("experts",) if "experts" in parts else (), tuple(p for p in parts if p != "experts")
    return [pool for pool in both if pool]


def groups_that_stay(
    model: nn.Module,
    rules: PruneSpec,
    scores: Mapping[str, Tensor],
    resize: Resize | None = None,
) -> dict[str, Tensor]:
    """Picks the groups that the rules leave, by name of a set. Raises ValueError as the picks."""
    if rules.order == "model":
        kept = keep_in_one_order(scores, weights_of_groups(supported(model)), rules.share)
    else:
        kept = {name: keep_indices(score, rules.share) for name, score in scores.items()}
    if resize is None:
        return kept
    return {
        name: highest(score, resize(name, score.shape[-1], kept[name].shape[-1]))
        for name, score in scores.items()
    }
