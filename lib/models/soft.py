"""Soft MoE (2308.00951): each slot of an expert gets a weighted mean of all tokens of an image.

Axis letters: **B** images, **N** tokens of an image, **D** width, **S** slots of all experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..routers.base import assign
from .experts import Experts
from .moe import RoutedLayer


class SoftMoELayer(RoutedLayer):
    """Soft MoE (2308.00951): every slot of an expert gets a weighted mean of all tokens of its
    image, nothing is chosen.

    Unit-norm tokens times unit-norm slot vectors, times a learned scale, give logits (B, N, S);
    dispatch weights are their softmax over tokens, combine weights their softmax over slots. No
    drops and no auxiliary loss. `slots`: per expert. The tape gets a Routing whose probabilities
    are the combine weights summed by expert.
    """

    def __init__(self, experts: Experts, slots: int = 1, generator: torch.Generator | None = None):
        super().__init__()
        self.experts, self.slots = experts, slots
        self.phi = nn.Parameter(torch.empty(experts.width, experts.experts * slots))
        self.scale = nn.Parameter(torch.ones(()))
        with torch.no_grad():
            self.phi.normal_(0.0, experts.width**-0.5, generator=generator)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, N, D) -> dispatch and combine weights, both (B, N, S)."""
        with torch.autocast(x.device.type, enabled=False):
            unit = nn.functional.normalize(x.float(), dim=-1)
            logits = self.scale * unit @ nn.functional.normalize(self.phi.float(), dim=0)
        return logits.softmax(dim=1), logits.softmax(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        b, n, d = x.shape
        dispatch, combine = self.weights(x)
        rows = (dispatch.transpose(1, 2).to(x.dtype) @ x).reshape(-1, d)  # (B*S, D)
        expert = (
            torch.arange(self.experts.experts, device=x.device)
            .repeat_interleave(self.slots)
            .repeat(b)
            .unsqueeze(1)
        )
        ones = torch.ones(expert.shape, device=x.device)
        own = torch.nn.functional.one_hot(expert[:, 0], self.experts.experts).float()
        out = self.experts(
            rows, assign(expert, ones, own, torch.zeros_like(own), (rows.shape[0], 1))
        )
        if self.tape is not None:
            probs = combine.view(b * n, self.experts.experts, self.slots).sum(dim=-1)
            choice = probs.detach().argsort(dim=-1, descending=True)
            self.tape.write(
                self,
                assign(choice, probs.gather(1, choice), probs, torch.zeros_like(probs), (b, n)),
            )
        return combine.to(out.dtype) @ out.view(b, -1, d)
