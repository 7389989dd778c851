"""What a run changes in its model before it trains: the contract of every step.

A step takes something out of a model (neurons, whole experts, experts extracted from MLPs). It is
named by the field of `RunSpec` that holds its rules, and the record keeps its report under the
same name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..inputs.splits import Split
from ..spec import RunSpec, Spec


@dataclass(frozen=True)
class StepInputs:
    """Holds what a step may read: the run, its training images and the weights of earlier runs."""

    spec: RunSpec
    images: Split  # the training split, without augmentation
    classes: int
    state_of: Callable[[RunSpec], dict[str, Tensor]]  # final weights of a run that this one needs
    checkpoint: Path | None = None  # a step may save its progress beside this file


@dataclass(frozen=True)
class StepResult:
    """Holds what a step reports, and which weights training must leave at zero."""

    report: Any  # the entry of the record; None: no entry
    # by parameter name: False where a weight must stay zero (unstructured pruning only)
    masks: Mapping[str, Tensor] = field(default_factory=dict)


class Step(ABC):
    """Changes a model by rules, before the run trains it."""

    name: ClassVar[str]  # the field of RunSpec that holds the rules
    # whether the changed model is evaluated on validation images where the run does not train
    validated: ClassVar[bool] = False

    def __init__(self, rules: Spec):
        self.rules = rules

    @abstractmethod
    def check(self, model: nn.Module, spec: RunSpec) -> None:
        """Raises ValueError if the step cannot be carried out on `model`.

        `model` lies on the meta device and is left as it is.
        """

    @abstractmethod
    def apply(self, model: nn.Module, inputs: StepInputs) -> StepResult:
        """Carries the step out on `model`, in place."""

    @abstractmethod
    def fit(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Gives a model without the step, in place, the structure that `state` was saved with.

        Returns the model. The values are loaded afterwards by the caller.
        """

    def remaining(self, size: int, part: str) -> int | None:
        """Returns how many of `size` parts of one kind the step leaves in a layer; None where only
        the scores of the run decide.

        part: the kind: the neurons of an "mlp" or of one of "experts", the dimensions of a head
        ("attention"), or the experts of an MoE layer ("whole_experts").
        """
        return size
