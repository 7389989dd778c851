"""Sends all tokens to one expert, whatever they are (calibration groups of the Leiden thesis).

Axis letters: **B** images, **N** tokens of an image, **D** width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Router, Routing, fixed


class ForcedRouter(Router):
    """Sends all tokens to `expert`, one of 0..experts-1, with weight 1."""

    def __init__(self, experts: int, expert: int):
        super().__init__(experts)
        self.top_k, self.expert = 1, expert

    def forward(self, x: Tensor) -> Routing:
        """Assigns each token of x, (B, N, D), to the expert."""
        b, n, _ = x.shape
        return fixed(torch.full((b * n, 1), self.expert, device=x.device), self.experts, (b, n))

    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts every token once."""
        return tokens

    def experts_per_image(self) -> float:
        """Counts the one expert."""
        return 1.0

    def decision_macs(self, tokens: int, images: int) -> int:
        """Counts nothing: there is no decision."""
        return 0
