"""Routers of experts that were extracted from a trained MLP: hard choices, without a gate.

Experts were parts of a whole that was not weighed either (MoEE, 2505.15414; MoEfication,
2110.01786).

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **K**
experts per token.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import Router, Routing, assign


class HardRouter(Router):
    """Chooses the K experts with the largest scores, with weight 1. Subclasses give `scores`."""

    def __init__(self, experts: int, top_k: int = 1):
        super().__init__(experts)
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} of {experts} experts: valid is 1 to {experts}")
        self.top_k = top_k

    @abstractmethod
    def scores(self, rows: Tensor) -> Tensor:
        """Scores the experts for rows, (T, D): (T, E).

        Both are float32, whatever the number type of the weights: close decisions would flip.
        """

    def forward(self, x: Tensor) -> Routing:
        """Decides on x, (B, N, D), with probability 1/K for the chosen experts and 0 for the
        others."""
        b, n, d = x.shape
        with torch.autocast(x.device.type, enabled=False):
            logits = self.scores(x.reshape(b * n, d).float())
        choice = logits.topk(self.top_k, dim=-1).indices
        probs = torch.zeros_like(logits).scatter(1, choice, 1 / self.top_k)
        return assign(choice, torch.ones_like(choice, dtype=logits.dtype), probs, logits, (b, n))

    def stored_numbers(self) -> int:
        """Counts parameters and buffers: centres are buffers because nothing trains them."""
        return sum(tensor.numel() for tensor in (*self.parameters(), *self.buffers()))

    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts every token once for each of its K experts."""
        return tokens * self.top_k

    def experts_per_image(self) -> float | None:
        """Counts all experts where a token passes all; else data decide."""
        return None if self.top_k < self.experts else float(self.top_k)

    def decision_macs(self, tokens: int, images: int) -> int:
        """Counts one product with each matrix a token."""
        tensors = (*self.parameters(), *self.buffers())
        return tokens * sum(tensor.numel() for tensor in tensors if tensor.ndim == 2)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top_k={self.top_k}"
