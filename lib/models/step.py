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
    """What a step may look at: the run, its training images, and the weights of earlier runs."""

    spec: RunSpec
    images: Split  # the training split, without augmentation
    classes: int
    state_of: Callable[[RunSpec], dict[str, Tensor]]  # final weights of a run that this one needs
    checkpoint: Path | None = None  # beside it a step may keep what it has done so far


@dataclass(frozen=True)
class StepResult:
    """report: the entry of the record, None for no entry. masks: of weights that training must keep
    at zero, by parameter name (unstructured pruning only)."""

    report: Any
    masks: Mapping[str, Tensor] = field(default_factory=dict)


class Step(ABC):
    """One change of a model, made from its rules."""

    name: ClassVar[str]  # the field of RunSpec
    # whether the changed model is evaluated on validation images where the run does not train
    validated: ClassVar[bool] = False

    def __init__(self, rules: Spec):
        self.rules = rules

    @abstractmethod
    def check(self, model: nn.Module, spec: RunSpec) -> None:
        """Raises ValueError if the step cannot be carried out on `model`, which lies on the meta
        device and is left as it is."""

    @abstractmethod
    def apply(self, model: nn.Module, inputs: StepInputs) -> StepResult:
        """Carries the step out on `model`, in place."""

    @abstractmethod
    def fit(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Gives an unchanged model, in place, the structure that `state` was saved with; returns
        it.

        The values are loaded afterwards by the caller.
        """

    def remaining(self, size: int, part: str) -> int:
        """Returns how many of `size` things the step leaves in a layer.

        part: which things: the neurons of an "mlp" or of one of "experts", the dimensions of a head
        ("attention"), or the experts of a MoE layer ("whole_experts").
        """
        return size
