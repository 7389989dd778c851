"""Sends each image to the expert that its class is mapped to, by hand (Durham report, Table 6).

Axis letters: **B** images, **N** tokens of an image, **E** experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .base import Routing, assign


class ManualRouter(nn.Module):
    """Experts by hand: all tokens of an image go to the expert that its class is mapped to (Durham
    report, Table 6).

    experts_of: {class: expert}. The classes of a batch are handed over by whoever runs the model:

        with router.given(labels):
            logits = model(images)
    """

    def __init__(self, experts: int, experts_of: dict[int, int]):
        super().__init__()
        if not experts_of or set(experts_of.values()) - set(range(experts)):
            raise ValueError(f"the map {experts_of} must send classes to experts 0..{experts - 1}")
        if sorted(experts_of) != list(range(len(experts_of))):
            absent = sorted(set(range(max(experts_of) + 1)) - set(experts_of))
            raise ValueError(
                f"the map has no expert for class {', '.join(map(str, absent))}: every class needs one"
            )
        self.experts, self.top_k = experts, 1
        self.register_buffer("table", torch.tensor([experts_of[c] for c in range(len(experts_of))]))
        self._labels: Tensor | None = None

    @contextmanager
    def given(self, labels: Tensor) -> Iterator[None]:
        """labels: (B,) classes of the images that run inside."""
        if labels.numel() and int(labels.max()) >= self.table.numel():
            raise ValueError(
                f"class {int(labels.max())} is not in the map, which ends at class {self.table.numel() - 1}"
            )
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) -> one decision an image, with weight one."""
        b, n, _ = x.shape
        if self._labels is None or self._labels.shape != (b,):
            raise RuntimeError(
                "manual routing needs the classes of this batch: run the model inside `with router.given(labels)`"
            )
        choice = self.table[self._labels].unsqueeze(1)
        probs = torch.nn.functional.one_hot(choice[:, 0], self.experts).float()
        return assign(
            choice, torch.ones(b, 1, device=x.device), probs, torch.zeros_like(probs), (b, n)
        )


@contextmanager
def labelled(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Inside, all manual routers of a model know the (B,) classes of the images that run."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ManualRouter):
                stack.enter_context(module.given(labels))
        yield
