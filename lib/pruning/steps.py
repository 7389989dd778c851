"""What a run prunes before it trains: neurons and attention dimensions (`PruneSpec`), or whole
experts (`DropSpec`).

Axis letters: **E** experts of a layer, **E'** those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.step import Step, StepInputs, StepResult
from ..routers.group import GroupRouter
from ..spec import DropSpec, PruneSpec, RunSpec, class_groups
from .experts import dropping, scores
from .experts.drop import drop
from .neurons.calibration import calibration
from .neurons.groups import groups_of, prunable, shapes_of
from .neurons.masks import mask_weights
from .neurons.prune import groups_that_stay, labelled_loss, parts_of, pools, prune
from .neurons.removal import fit_shapes
from .neurons.scores import Batches, cut_size

DROP_BATCH = 64  # calibration images at a time


class PruneStep(Step):
    """Removes hidden neurons and attention dimensions (Leiden thesis, section 4).

    Scores are taken on training images without augmentation, in float32; `spec.seed` draws the
    images.
    """

    name = "prune"
    rules: PruneSpec

    def check(self, model: nn.Module, spec: RunSpec) -> None:
        """Raises ValueError if a layer cannot be pruned or the share would leave one without
        neurons."""
        rules = self.rules
        shapes = shapes_of(prunable(model, parts_of(model, rules)))
        if not rules.structured:
            return
        if rules.order == "model":
            for pool in pools(model, rules):
                pool_shapes = shapes_of(prunable(model, pool))
                any_scores = {name: torch.zeros(shape) for name, shape in pool_shapes.items()}
                groups_that_stay(model, rules, any_scores)
            return
        for name, shape in shapes.items():
            try:
                cut_size(shape[-1], rules.share)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def apply(self, model: nn.Module, inputs: StepInputs) -> StepResult:
        """Prunes `model`; reports its prunable weights `before` and `after`.

        Experts go first, each scored on images of its own class group, or all on the same ones,
        whose tokens are forced through it. Then the rest, on class-balanced images that the routers
        send where they like (Leiden thesis, its order). Raises ValueError as the scores do.
        """
        rules, parts = self.rules, parts_of(model, self.rules)
        generator = torch.Generator().manual_seed(inputs.spec.seed)
        balanced = self._balanced(inputs, generator)
        of_experts = None
        if "experts" in parts:
            of_experts = self._of_experts(model, inputs, balanced, generator)
        if not rules.structured:
            masks = mask_weights(
                model,
                balanced,
                rules.share,
                batches_of_expert=of_experts,
                parts=parts,
                loss=labelled_loss,
            )
            before = sum(mask.numel() for mask in masks.values())
            after = sum(int(mask.sum()) for mask in masks.values())
            return StepResult({"before": before, "after": after}, masks)
        before = self._prunable_weights(model)
        prune(model, rules, balanced, of_experts=of_experts, generator=generator)
        return StepResult({"before": before, "after": self._prunable_weights(model)})

    def fit(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Prunes an unpruned model to the shapes of `state`. Raises ValueError as `fit_shapes`."""
        return fit_shapes(model, state)

    def remaining(self, size: int, part: str) -> int | None:
        """Returns what the share leaves of `size` neurons or head dimensions; None where one order
        over the model decides."""
        rules = self.rules
        pruned = part != "whole_experts" and (rules.parts is None or part in rules.parts)
        if not (rules.structured and pruned):
            return size
        return None if rules.order == "model" else size - cut_size(size, rules.share)

    def _prunable_weights(self, model: nn.Module) -> int:
        """How many single weights and biases belong to what may be removed."""
        modules = prunable(model, parts_of(model, self.rules))
        return sum(
            tensor.numel()
            for name, module in modules.items()
            for _, tensors in groups_of(name, module)
            for tensor in tensors
        )

    def _balanced(self, inputs: StepInputs, generator: torch.Generator) -> Batches:
        """Class-balanced calibration images."""
        every_class = [range(inputs.classes)]
        [index] = calibration(inputs.images.labels, every_class, self.rules.images, generator)
        return self._batches(inputs, index)

    def _of_experts(
        self, model: nn.Module, inputs: StepInputs, balanced: Batches, generator: torch.Generator
    ) -> Sequence[Batches]:
        """Calibration images of each expert: of its class group, or the balanced ones for all."""
        experts = next(module.experts for module in prunable(model, ("experts",)).values())
        if not self.rules.by_class:
            return [balanced] * experts
        groups = class_groups(inputs.classes, experts)
        drawn = calibration(inputs.images.labels, groups, self.rules.images, generator)
        return [self._batches(inputs, index) for index in drawn]

    def _batches(self, inputs: StepInputs, index: Tensor) -> Batches:
        return [_batch(inputs, part) for part in index.tensor_split(self.rules.batches)]


class DropStep(Step):
    """Drops whole experts (2405.16646, and rival scores), or merges them.

    Measured scores and merging see class-balanced training images without augmentation, which
    `spec.seed` draws, in float32.
    """

    name = "drop"
    rules: DropSpec

    def check(self, model: nn.Module, spec: RunSpec) -> None:
        """Raises ValueError if experts cannot be dropped from a layer, if the share is no whole
        number of experts, or if fewer are left than a token chooses."""
        dropping.routed(model)
        left = scores.remaining(spec.moe.experts // spec.moe.members, self.rules.share)
        if self.rules.missing == "reroute" and left < spec.moe.top_k:
            raise ValueError(
                f"drop.share={self.rules.share} leaves {left} experts to choose among, "
                f"moe.top_k={spec.moe.top_k} is more: drop fewer, or set drop.missing='zero_update'"
            )

    def apply(self, model: nn.Module, inputs: StepInputs) -> StepResult:
        """Drops experts of `model`; reports the `scores` {layer: E}, none of them for merging.

        Of an ensemble each member loses the same share. Raises ValueError as the scores and
        removals in `experts` do.
        """
        rules, generator = self.rules, torch.Generator().manual_seed(inputs.spec.seed)
        every_class = [range(inputs.classes)]
        [index] = calibration(inputs.images.labels, every_class, rules.images, generator)
        images = [_batch(inputs, part)[0] for part in index.split(DROP_BATCH)]
        before = inputs.state_of(inputs.spec.init.init) if rules.compares else None
        scores_by_layer = drop(model, rules, images, before=before, generator=generator).scores
        return StepResult({"scores": {name: s.tolist() for name, s in scores_by_layer.items()}})

    def fit(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Drops experts of an unchanged model until it has as many as `state`.

        What became of the missing experts is read off the state: a layer with `kept` gives zero
        updates for them, one with fewer router rows reroutes. Raises ValueError as `drop_experts`.
        """
        kept_experts: dict[str, dict[str, Tensor]] = {name: {} for name in dropping.SEMANTICS}
        for name, layer in dropping.routed(model).items():
            rows = state.get(f"{name}.router.weight")
            if f"{name}.kept" in state:
                kept_experts["zero_update"][name] = state[f"{name}.kept"]
            elif rows is not None and len(rows) < layer.router.experts:
                member_of_expert = state.get(f"{name}.router.group")
                kept_experts["reroute"][name] = _as_many(layer.router, len(rows), member_of_expert)
        # Rerouting first: a layer of zero updates is not `routed` any more.
        for semantics in reversed(dropping.SEMANTICS):
            dropping.drop_experts(model, kept_experts[semantics], semantics)
        return model

    def remaining(self, size: int, part: str) -> int:
        """Returns what the share leaves of `size` experts."""
        return scores.remaining(size, self.rules.share) if part == "whole_experts" else size


def _as_many(router: nn.Module, experts: int, member_of_expert: Tensor | None) -> Tensor:
    """(E',) any experts, as many as are left, of an ensemble as many of each member: their weights
    are loaded over."""
    if member_of_expert is None or not isinstance(router, GroupRouter):
        return torch.arange(experts)
    first_of_each = [
        (router.group == member).nonzero()[: int((member_of_expert == member).sum()), 0]
        for member in range(router.members)
    ]
    return torch.cat(first_of_each)


def _batch(inputs: StepInputs, index: Tensor) -> tuple[Tensor, Tensor]:
    """Training images without augmentation, with their labels, where the run computes."""
    device = inputs.spec.device
    images = inputs.images.batch(index, inputs.spec)
    return images.to(device), inputs.images.labels[index].to(device)
