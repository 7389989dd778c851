"""Soft MoE (2308.00951): each slot of an expert gets a weighted mean of all tokens of an image.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **S**
slots of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import MoESpec
from .base import Router, Routing, assign, fixed


@dataclass(frozen=True)
class SoftRouting(Routing):
    """Adds what mixes tokens into slots and slots back into tokens.

    dispatch: (B, N, S), sums to 1 over the tokens of an image; combine: (B, N, S), over its slots.
    The fields of a Routing list every expert for every token, the largest combine weight first.
    """

    dispatch: Tensor
    combine: Tensor


class SoftRouter(Router):
    """Mixes all tokens of an image into the slots of each expert, and the outputs back; nothing is
    chosen (2308.00951).

    Unit-norm tokens times unit-norm slot vectors, times a learned scale, give logits (B, N, S);
    dispatch weights are their softmax over tokens, combine weights their softmax over slots. No
    drops and no auxiliary loss. slots: of each expert, so S = E * slots. The probabilities of the
    Routing are the combine weights summed by expert.
    """

    mixes_tokens: ClassVar[bool] = True

    def __init__(
        self, width: int, experts: int, slots: int = 1, generator: torch.Generator | None = None
    ):
        super().__init__(experts)
        self.slots = slots
        self.phi = nn.Parameter(torch.empty(width, experts * slots))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset(generator)

    @classmethod
    def from_spec(cls, spec: MoESpec, width: int, generator: torch.Generator | None) -> Self:
        """Makes the router, drawn from the generator."""
        return cls(width, spec.experts, spec.slots, generator)

    @property
    def width(self) -> int:
        """Returns D."""
        return self.phi.shape[0]

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws the slot vectors anew, normal with std 1/sqrt(D); the scale starts at 1."""
        self.phi.normal_(0.0, self.phi.shape[0] ** -0.5, generator=generator)
        self.scale.fill_(1.0)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the dispatch and combine weights of x, (B, N, D): both (B, N, S)."""
        with torch.autocast(x.device.type, enabled=False):
            unit = F.normalize(x.float(), dim=-1)
            logits = self.scale * unit @ F.normalize(self.phi.float(), dim=0)
        return logits.softmax(dim=1), logits.softmax(dim=2)

    def forward(self, x: Tensor) -> SoftRouting:
        """Weighs the tokens of x, (B, N, D), for each slot, and the slots for each token."""
        b, n, _ = x.shape
        dispatch, combine = self.weights(x)
        probs = combine.view(b * n, self.experts, self.slots).sum(dim=-1)
        choice = probs.detach().argsort(dim=-1, descending=True)
        listed = assign(choice, probs.gather(1, choice), probs, torch.zeros_like(probs), (b, n))
        return SoftRouting(**vars(listed), dispatch=dispatch, combine=combine)

    def serve(
        self, experts: Callable[[Tensor, Routing], Tensor], rows: Tensor, routing: SoftRouting
    ) -> Tensor:
        """Runs each slot through its expert: rows, (T, D) -> (T, D)."""
        (b, n, slots), d = routing.dispatch.shape, rows.shape[1]
        tokens = rows.view(b, n, d)
        dispatch = routing.dispatch.transpose(1, 2).to(rows.dtype)
        inputs = (dispatch @ tokens).reshape(b * slots, d)  # (B, S, D) -> (B*S, D)
        numbers = torch.arange(self.experts, device=rows.device)
        expert_of_slot = numbers.repeat_interleave(self.slots).repeat(b)
        out = experts(inputs, fixed(expert_of_slot.unsqueeze(1), self.experts, (b * slots, 1)))
        return (routing.combine.to(out.dtype) @ out.view(b, slots, d)).reshape(b * n, d)

    def serve_all(self, experts: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """Runs the slots of each expert through it, and mixes them: (B, N, D) -> (T, D)."""
        dispatch, combine = self.weights(x)
        inputs = dispatch.transpose(1, 2).to(x.dtype) @ x  # (B, S, D)
        slots = inputs.unflatten(1, (self.experts, self.slots)).unbind(1)
        out = [expert(rows) for expert, rows in zip(experts, slots, strict=True)]
        return (combine.to(x.dtype) @ torch.cat(out, dim=1)).reshape(-1, x.shape[-1])

    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts the slots of each image."""
        return images * self.experts * self.slots

    def experts_per_image(self) -> float:
        """Counts all experts."""
        return float(self.experts)

    def decision_macs(self, tokens: int, images: int) -> int:
        """Counts three products of N x S x D an image: the logits, the slots' inputs, the way
        back."""
        return 3 * tokens * self.phi.numel()
