"""Dropping or merging of whole experts by a set of rules: scores, the experts that stay, removal.

Axis letters: **B** images, **E** experts of a layer, **E'** those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...routers.group import GroupRouter
from ...spec import DropSpec
from . import dropping, merging, scores

MERGING = {"dern": merging.dern, "merge": merging.merge_similar}


class Dropped(NamedTuple):
    """Holds what was decided, {layer: (E,) scores} and {layer: (E',) experts that stay}; merging
    decides neither."""

    scores: dict[str, Tensor]
    staying: dict[str, Tensor]


def drop(
    model: nn.Module,
    rules: DropSpec,
    images: Sequence[Tensor],
    *,
    before: Mapping[str, Tensor] | None = None,
    generator: torch.Generator,
) -> Dropped:
    """Drops experts, in place; returns their scores and which stay.

    Of an ensemble each member loses the same share. images: batches (B, channels, height, width),
    for the scores that are measured. before: the state before finetuning, for those that compare.
    Raises ValueError as the scores and removals do.
    """
    if rules.score in MERGING:
        MERGING[rules.score](model, images, rules.share)
        return Dropped({}, {})
    scores_by_layer = scores.scores(
        model,
        rules.score,
        before=before,
        calibration=scores.calibrate(model, images) if rules.score in scores.MEASURED else None,
        generator=generator,
    )
    staying = best_experts(model, scores_by_layer, rules.share)
    dropping.drop_experts(model, staying, rules.missing)
    return Dropped(scores_by_layer, staying)


def best_experts(
    model: nn.Module, scores_by_layer: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """{layer: experts that stay}: the best of each layer, of an ensemble those of each member."""
    router = next(iter(dropping.routed(model).values())).router
    if not isinstance(router, GroupRouter):
        return scores.keep_by_score(scores_by_layer, share)
    best: dict[str, list[Tensor]] = {name: [] for name in scores_by_layer}
    for member in range(router.members):
        experts = (router.group.cpu() == member).nonzero()[:, 0]
        scores_of_member = {name: score[experts] for name, score in scores_by_layer.items()}
        for name, index in scores.keep_by_score(scores_of_member, share).items():
            best[name].append(experts[index])
    return {name: torch.cat(parts) for name, parts in best.items()}
