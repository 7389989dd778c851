"""Sends each image to the expert that its class is mapped to, by hand (Durham report, Table 6).

Axis letters: **B** images, **N** tokens of an image, **D** width, **E** experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..spec import MoESpec
from .base import Router, Routing, fixed


class ManualRouter(Router):
    """Sends all tokens of an image to the expert that its class is mapped to (Durham report, Table
    6).

    experts_of: {class: expert}. The classes of a batch are handed over by whoever runs the model:

        with router.given(labels):
            logits = model(images)
    """

    not_exported = "a ManualRouter decides by the class of an image, which is no input of a model"

    def __init__(self, experts: int, experts_of: dict[int, int]):
        super().__init__(experts)
        if not experts_of or set(experts_of.values()) - set(range(experts)):
            raise ValueError(f"the map {experts_of} must send classes to experts 0..{experts - 1}")
        if sorted(experts_of) != list(range(len(experts_of))):
            absent = sorted(set(range(max(experts_of) + 1)) - set(experts_of))
            raise ValueError(
                f"the map has no expert for class {', '.join(map(str, absent))}: "
                "every class needs one"
            )
        self.top_k = 1
        self.register_buffer("table", torch.tensor([experts_of[c] for c in range(len(experts_of))]))
        self._labels: Tensor | None = None

    @classmethod
    def from_spec(cls, spec: MoESpec, width: int, generator: torch.Generator | None) -> Self:
        """Makes the router; draws nothing."""
        experts_of = {c: expert for expert, classes in enumerate(spec.groups) for c in classes}
        return cls(spec.experts, experts_of)

    def settings(self) -> dict[str, Any]:
        """Counts experts and classes; the map is part of the state."""
        return {"experts": self.experts, "classes": len(self.table)}

    @classmethod
    def with_settings(cls, settings: Mapping[str, Any], act: nn.Module | None) -> Self:
        """Makes the router; the map comes from a state."""
        return cls(settings["experts"], dict.fromkeys(range(settings["classes"]), 0))

    @contextmanager
    def given(self, labels: Tensor) -> Iterator[None]:
        """Tells the router the (B,) classes of the images that run inside."""
        if labels.numel() and int(labels.max()) >= self.table.numel():
            raise ValueError(
                f"class {int(labels.max())} is not in the map, which ends at class "
                f"{self.table.numel() - 1}"
            )
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def forward(self, x: Tensor) -> Routing:
        """Decides for each image of x, (B, N, D), with weight one."""
        b, n, _ = x.shape
        if self._labels is None or self._labels.shape != (b,):
            raise RuntimeError(
                "manual routing needs the classes of this batch: "
                "run the model inside `with router.given(labels)`"
            )
        return fixed(self.table[self._labels].unsqueeze(1), self.experts, (b, n))

    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts every token once."""
        return tokens

    def experts_per_image(self) -> float:
        """Counts the one expert of its class."""
        return 1.0

    def decision_macs(self, tokens: int, images: int) -> int:
        """Counts nothing: a decision is a look at a table."""
        return 0


@contextmanager
def labelled(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Tells all manual routers of a model the (B,) classes of the images that run inside."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ManualRouter):
                stack.enter_context(module.given(labels))
        yield
