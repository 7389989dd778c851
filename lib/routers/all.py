"""Sends every token to every expert: no choice, nothing to learn.

Axis letters: **B** images, **N** tokens of an image, **E** experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Routing, assign


class AllExperts(nn.Module):
    """No router: every token passes every expert, with weight 1 (printed: the sum) or 1/E
    (renormalised: the mean).

    With two experts and weight 1 this is the dense two-FFN model of ViMoE's Table 3.
    """

    def __init__(self, experts: int, gate: str = "printed"):
        super().__init__()
        self.experts = self.top_k = experts
        self.gate = gate

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) -> a Routing with E assignments a token and uniform probabilities."""
        b, n, _ = x.shape
        probs = torch.full((b * n, self.experts), 1.0 / self.experts, device=x.device)
        choice = torch.arange(self.experts, device=x.device).expand(b * n, -1)
        weight = torch.ones_like(probs) if self.gate == "printed" else probs
        return assign(choice, weight, probs, torch.zeros_like(probs), (b, n))
