"""Dropping experts during one finetuning run (Chen et al. 2022, 2206.00277), until each MoE layer
has one.

    drop = ProgressiveDrop(model, steps)
    ... after step t:  drop.after(t, tape)
    drop.finish()

While it runs, dropped experts are masked in the router and keep their place, so that the optimiser
goes on as it is; at the end they are removed. Axis letters: **A** assignments, **E** experts of a
layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .top_k import TopKRouter


class SurvivorRouter(TopKRouter):
    """A top-k router whose softmax and choice are over the experts that are `alive`, (E,) bool."""

    @classmethod
    def of(cls, router: TopKRouter) -> SurvivorRouter:
        """The same router, its parameter included, with all experts alive."""
        out = cls.like(router)
        out.register_buffer(
            "alive", torch.ones(router.experts, dtype=torch.bool, device=router.weight.device)
        )
        return out

    def reachable(self, rows: int) -> Tensor:
        """(E,) the same for all rows."""
        return self.alive
