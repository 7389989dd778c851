"""What a run makes of the MLPs of its parent: experts, or MLPs some of whose neurons are chosen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models.step import Step, StepInputs, StepResult
from ..spec import ChannelSpec, ExtractSpec, RunSpec
from . import extract
from .runtime_masks import check_maskable, mask_channels, narrow_to_channels
from .saved import fit_extracted


class ExtractStep(Step):
    """Replaces the MLPs of a trained model by experts, or by narrower MLPs."""

    name = "extract"
    validated = True  # extraction without training is still chosen on validation images
    rules: ExtractSpec

    def check(self, model: nn.Module, spec: RunSpec) -> None:
        """Raises ValueError if experts cannot be extracted from a layer."""
        extract.check(model, self.rules)

    def apply(self, model: nn.Module, inputs: StepInputs) -> StepResult:
        """Extracts; reports a row a layer."""
        return StepResult(
            extract.extract(model, inputs.spec, inputs.images, inputs.classes, inputs.checkpoint)
        )

    def fit(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Gives the MLPs the shapes of `state`. Raises ValueError as `fit_extracted`."""
        return fit_extracted(model, state, self.rules)


class ChannelStep(Step):
    """Lets a part of the hidden neurons act, chosen while the model runs or once before."""

    name = "channels"
    rules: ChannelSpec

    def check(self, model: nn.Module, spec: RunSpec) -> None:
        """Raises ValueError if neurons of the model cannot be chosen at run time."""
        check_maskable(model)

    def apply(self, model: nn.Module, inputs: StepInputs) -> StepResult:
        """Chooses once, or puts masks in; reports nothing that the rules do not say."""
        rules = self.rules
        check_maskable(model)
        if rules.pool == "calibration":
            batches = extract.calibration_batches(
                inputs.spec, rules.images, inputs.images, inputs.classes
            )
            narrow_to_channels(model, rules.active, torch.cat(list(batches)))
        else:
            mask_channels(model, rules.active, rules.pool)
        return StepResult(None)

    def fit(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Raises ValueError: no run starts from one that only evaluates (`RunSpec`)."""
        raise ValueError(
            "a run with channels leaves no weights of its own: take those of the run that it "
            "started from"
        )
