"""Gives every expert exactly as many tokens, the highest-weighted ones first (Durham report,
section 3).

Axis letters: **B** images, **N** tokens of an image, **D** width, **E** experts, **G** groups of
tokens that compete.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearRouter, Routing, assign, capacity


class PriorityRouter(LinearRouter):
    """Top-1 with exactly equal loads: experts keep their highest-weighted tokens, a refused token
    goes to its next choice.

    Durham report, section 3. Unlike V-MoE's batch priority routing nothing is dropped. Both sides
    rank by the same probability, so the stable outcome is unique (see `balanced_match`). Loads are
    equal if E divides the number of tokens in a group ("image" or "batch"), and differ by what the
    last expert lacks otherwise.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        group: str = "batch",
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
        self.group, self.gate = group, gate

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) -> a Routing in which every token has one expert."""
        b, n, d = x.shape
        probs, logits = self.scores(x.reshape(b * n, d))
        groups = b if self.group == "image" else 1
        choice = balanced_match(probs.detach().view(groups, b * n // groups, self.experts)).view(
            b * n, 1
        )
        weight = probs.gather(1, choice)
        return assign(
            choice,
            weight / weight.detach() if self.gate == "renormalised" else weight,
            probs,
            logits,
            (b, n),
        )


def balanced_match(scores: Tensor) -> Tensor:
    """scores: (G, n, E) -> (G, n) expert of each token, at most ceil(n / E) tokens an expert and
    group.

    Both sides rank by the same score, so the stable outcome is what the pairs give in falling
    order: each takes effect if its token has no expert and its expert has room; earlier tokens
    first among equals. A round gives out the best pair of each waiting token in that order until an
    expert runs full, so there are at most E rounds. (Deferred acceptance finds the same, but when
    preferences are alike its refusals come one by one, thousands of rounds.)
    """
    groups, size, experts = scores.shape
    room = torch.full((groups, experts), capacity(1.0, 1, size, experts), device=scores.device)
    place = torch.full((groups, size), -1, device=scores.device)
    while bool((place < 0).any()):
        value, best = scores.masked_fill(room.unsqueeze(1) == 0, -torch.inf).max(dim=-1)
        value = value.masked_fill(place >= 0, -torch.inf)
        order = value.argsort(dim=-1, descending=True, stable=True)
        asked = best.gather(1, order)
        asks = torch.nn.functional.one_hot(asked, experts) * (place.gather(1, order) < 0).unsqueeze(
            -1
        )
        number = (
            asks.cumsum(dim=1).gather(2, asked.unsqueeze(-1)).squeeze(-1)
        )  # which ask of its expert this is, from 1
        before_full = (number > room.gather(1, asked)).cumsum(dim=1) == 0
        served = asks * before_full.unsqueeze(-1)
        given = torch.where(served.any(dim=-1), asked, place.gather(1, order))
        place = place.scatter(1, order, given)
        room = room - served.sum(dim=1)
    return place
