"""Sends every token to every expert: no choice, nothing to learn.

Axis letters: **B** images, **N** tokens of an image, **D** width, **E** experts.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from ..spec import MoESpec
from .base import Router, Routing, assign


class AllExperts(Router):
    """Sends every token through every expert, with weight 1 (gate="printed": the sum) or 1/E
    ("renormalised": the mean).

    With two experts and weight 1 this is the sum of two MLPs, a control beside ViMoE's Table 3,
    whose dense models weight the two by a gate.
    """

    def __init__(self, experts: int, gate: str = "printed"):
        super().__init__(experts)
        self.top_k, self.gate = experts, gate

    @classmethod
    def from_spec(cls, spec: MoESpec, width: int, generator: torch.Generator | None) -> Self:
        """Makes the router; draws nothing."""
        return cls(spec.experts, spec.gate)

    def forward(self, x: Tensor) -> Routing:
        """Assigns each token of x, (B, N, D), to all E experts, with uniform probabilities."""
        b, n, _ = x.shape
        probs = torch.full((b * n, self.experts), 1.0 / self.experts, device=x.device)
        choice = torch.arange(self.experts, device=x.device).expand(b * n, -1)
        weight = torch.ones_like(probs) if self.gate == "printed" else probs
        return assign(choice, weight, probs, torch.zeros_like(probs), (b, n))

    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts every token once an expert."""
        return tokens * self.experts

    def experts_per_image(self) -> int:
        """Counts all experts."""
        return self.experts

    def decision_macs(self, tokens: int, images: int) -> int:
        """Counts nothing: there is no decision."""
        return 0
