"""A `PruneSpec` carried out: calibration images, scores, and removal or masks, before a run trains.

Axis letters: **B** images, **E** experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split
from ..models.strategies import labelled
from ..spec import PruneSpec, RunSpec, class_groups
from .neurons import Batches, calibration, cut_size, expert_scores, keep_indices, mask_weights, neuron_scores
from .removal import groups_of, parts_in, prunable, remove, shapes_of


def prune(model: nn.Module, spec: RunSpec, split: Split, classes: int) -> dict[str, Tensor]:
    """Prune `model` in place as `spec.prune` says; returns the masks of the unstructured arm, nothing else.

    Scores are taken on training images without augmentation, in float32. Experts go first, each scored on images of its own
    class group, all of whose tokens are forced through it; then the rest, on class-balanced images that the routers send where
    they like (Leiden thesis, its order). `spec.seed` draws the images. Raises ValueError as the scores do.
    """
    rules, generator = spec.prune, torch.Generator().manual_seed(spec.seed)

    def batches(index: Tensor) -> Batches:
        return [(split.batch(part, spec.data).to(spec.device), split.labels[part].to(spec.device))
                for part in index.chunk(rules.batches)]

    balanced = batches(calibration(split.labels, [range(classes)], rules.images, generator)[0])
    present = parts_of(model, rules)
    groups = None
    if "experts" in present and rules.by_class:
        experts = next(module.experts for module in prunable(model, ("experts",)).values())
        drawn = calibration(split.labels, class_groups(classes, experts), rules.images, generator)
        groups = [batches(index) for index in drawn]
    if not rules.structured:
        return mask_weights(model, balanced, rules.share, groups=groups, parts=present, loss=_loss)
    rest = [part for part in present if part != "experts"]
    given = {"kind": rules.kind, "loss": _loss, "generator": generator}
    if groups is not None:
        _cut(model, expert_scores(model, groups, **given), rules.share)
    elif "experts" in present:
        _cut(model, neuron_scores(model, balanced, parts=("experts",), **given), rules.share)
    if rest:
        _cut(model, neuron_scores(model, balanced, parts=rest, **given), rules.share)
    return {}


def check(model: nn.Module, rules: PruneSpec) -> None:
    """Raise ValueError if a layer cannot be cut or the share would leave one without groups; needs no data."""
    shapes = shapes_of(prunable(model, parts_of(model, rules)))
    for name, shape in shapes.items() if rules.structured else ():
        try:
            cut_size(shape[-1], rules.share)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def parts_of(model: nn.Module, rules: PruneSpec) -> tuple[str, ...]:
    """The parts that are pruned: those asked for, else all that the model has."""
    return parts_in(model) if rules.parts is None else rules.parts


def weights_in(model: nn.Module, rules: PruneSpec) -> int:
    """How many single weights and biases lie in groups that the rules may take."""
    modules = prunable(model, parts_of(model, rules))
    return sum(piece.numel() for name, module in modules.items() for _, pieces in groups_of(name, module) for piece in pieces)


def _cut(model: nn.Module, scores: dict[str, Tensor], share: float) -> None:
    remove(model, {name: keep_indices(score, share) for name, score in scores.items()})


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with labelled(model, labels):  # the warm-up of experts routes by class
        return F.cross_entropy(model(images), labels)
