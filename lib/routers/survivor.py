"""Routes among the experts that are still alive while experts are dropped during a finetuning run
(Chen et al. 2022, 2206.00277).

Axis letters: **E** experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .top_k import TopKRouter


class SurvivorRouter(TopKRouter):
    """Chooses, and takes the softmax, among the experts that are `alive`, (E,) bool.

    Dropped experts are masked and keep their place, so that the optimiser goes on as it is.
    """

    @classmethod
    def of(cls, router: TopKRouter) -> Self:
        """Makes the same router, parameter included, with all experts alive."""
        out = cls.like(router)
        out.register_buffer(
            "alive", torch.ones(router.experts, dtype=torch.bool, device=router.weight.device)
        )
        return out

    @classmethod
    def with_settings(cls, settings: Mapping[str, Any], act: nn.Module | None) -> Self:
        """Makes the router; who is alive comes from a state."""
        return cls.of(TopKRouter(**settings))

    def reachable(self, rows: int) -> Tensor:
        """Says which experts are alive, (E,), the same for all rows."""
        return self.alive
