"""Extraction as a step of a run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..models.step import Step, StepInputs, StepResult
from ..spec import RunSpec
from .extract import check, extract
from .saved import fit_extracted


class ExtractStep(Step):
    """Makes experts, or narrower MLPs, of the MLPs of a trained model, as an `ExtractSpec` says."""

    name = "extract"

    def check(self, model: nn.Module, spec: RunSpec) -> None:
        check(model, self.rules)

    def apply(self, model: nn.Module, inputs: StepInputs) -> StepResult:
        """Raises ValueError as `extract` does; finished layers are filed beside the checkpoint."""
        reports = extract(model, inputs.spec, inputs.images, inputs.classes, inputs.checkpoint)
        return StepResult(reports)

    def fit(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        return fit_extracted(model, state, self.rules)
