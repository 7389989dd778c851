"""Further routing strategies: expert choice, priority, hand-made, and Soft MoE. All end in one
`Routing`.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **S**
slots, **G** groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearRouter, Routing, capacity


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes its top C = c T / E tokens by softmax probability (2202.09368); a token may
    get 0 to E experts.

    choices: c, experts a token gets on average. group: "image" or "batch", the tokens that compete
    with each other. A batch as group makes an image's result depend on its neighbours, at
    evaluation too. gate: "printed", or "renormalised" over the experts that took a token.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        choices: float = 1.0,
        group: str = "image",
        gate: str = "printed",
        noise: float = 0.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ):
        super().__init__(width, experts, noise=noise, std=std, generator=generator)
        if group not in ("image", "batch"):
            raise ValueError(
                f"group={group!r} is unknown: tokens compete within an 'image' or within the 'batch'"
            )
        if not 0 < choices <= experts:
            raise ValueError(f"choices={choices} must be above 0 and at most experts={experts}")
        self.choices, self.group, self.gate = choices, group, gate

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) -> a Routing in which every expert serves equally many tokens of each group."""
        b, n, d = x.shape
        probs, logits = self.scores(x.reshape(b * n, d))
        groups = b if self.group == "image" else 1
        size = b * n // groups
        slots = min(size, capacity(self.choices, 1, size, self.experts))
        scores = probs.view(groups, size, self.experts)
        taken = (
            scores.detach().topk(slots, dim=1).indices
        )  # (G, C, E): which tokens each expert takes
        chosen = (
            torch.zeros_like(scores, dtype=torch.bool)
            .scatter_(1, taken, True)
            .view(b * n, self.experts)
        )
        token, expert = chosen.nonzero(as_tuple=True)
        weight = probs[token, expert]
        if self.gate == "renormalised":
            weight = weight / (probs * chosen).sum(dim=-1)[token]
        ranked = probs.detach().masked_fill(~chosen, -1.0).sort(dim=-1, descending=True)
        choice = ranked.indices.masked_fill(ranked.values < 0, -1)
        return Routing(
            token, expert, weight, probs, logits, choice, torch.zeros_like(choice[:, 0]), (b, n)
        )
