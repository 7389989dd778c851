"""The steps of a run: a class for each field of `RunSpec` that holds the rules of one."""

from __future__ import annotations

from ..extraction.step import ChannelStep, ExtractStep
from ..models.step import Step
from ..pruning.steps import DropStep, PruneStep
from ..spec import RunSpec

STEPS: dict[str, type[Step]] = {
    step.name: step for step in (PruneStep, DropStep, ExtractStep, ChannelStep)
}


def steps_of(spec: RunSpec) -> list[Step]:
    """Returns the steps of a run, in the order in which they are carried out."""
    return [STEPS[field](rules) for field, rules in spec.steps]
