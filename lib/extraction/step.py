"""What a run extracts before it trains: experts out of the MLPs of its parent (`ExtractSpec`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..models.step import Step, StepInputs, StepResult
from ..spec import ExtractSpec, RunSpec
from . import extract
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
