"""Gives every expert exactly as many tokens, the highest-weighted ones first (Durham report,
section 3).

Axis letters: **B** images, **N** tokens of an image, **D** width, **E** experts, **P** pools of
competing tokens, **S** tokens of a pool.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from ..spec import MoESpec
from .base import LinearRouter, Routing, assign, capacity, check_pool, falling_order, one_in_value


class PriorityRouter(LinearRouter):
    """Gives each token one expert, with exactly equal loads: experts keep their highest-weighted
    tokens, a refused token goes to its next choice.

    Durham report, section 3. Unlike V-MoE's batch priority routing nothing is dropped. Both sides
    rank by the same probability, so the stable outcome is unique (see `balanced_match`). Loads are
    equal if E divides the number of tokens that compete, those of an "image" or of the "batch"
    (group), and differ by what the last expert lacks otherwise.
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
        check_pool(group)
        self.group, self.gate = group, gate

    @classmethod
    def from_spec(cls, spec: MoESpec, width: int, generator: torch.Generator | None) -> Self:
        """Makes the router, drawn from the generator."""
        return cls(
            width,
            spec.experts,
            group=spec.group,
            gate=spec.gate,
            noise=spec.noise,
            std=spec.router_std,
            generator=generator,
        )

    def forward(self, x: Tensor) -> Routing:
        """Gives every token of x, (B, N, D), one expert."""
        b, n, d = x.shape
        probs, logits, deciding = self.scores(x.reshape(b * n, d))
        pools, size = (b, n) if self.group == "image" else (1, b * n)
        pooled = probs.detach().view(pools, size, self.experts)  # (P, S, E)
        choice = balanced_match(pooled).view(b * n, 1)
        weight = probs.gather(1, choice)
        if self.gate == "renormalised":  # one in value, with a gradient
            weight = one_in_value(weight, deciding, choice)
        return assign(choice, weight, probs, logits, (b, n))

    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts every token once."""
        return tokens

    def experts_per_image(self) -> None:
        """Leaves it to data."""
        return None


def balanced_match(scores: Tensor) -> Tensor:
    """Matches the tokens of each pool with experts, at most ceil(S / E) tokens an expert.

    scores: (P, S, E) -> (P, S) expert of each token. Both sides rank by the same score, so the
    stable outcome is what the pairs give in falling order: each takes effect if its token has no
    expert and its expert has room; earlier tokens first among equals. A round gives out the best
    pair of each waiting token in that order until an expert runs full, so there are at most E
    rounds. (Deferred acceptance finds the same, but when preferences are alike its refusals come
    one by one, thousands of rounds.)
    """
    pools, size, experts = scores.shape
    room = torch.full((pools, experts), capacity(1.0, 1, size, experts), device=scores.device)
    place = torch.full((pools, size), -1, device=scores.device)  # -1: still waits
    for _ in range(experts):
        # traced, all rounds are run: those in which nobody waits change nothing
        if not torch.compiler.is_compiling() and not bool((place < 0).any()):
            break
        value, best = scores.masked_fill(room.unsqueeze(1) == 0, -torch.inf).max(dim=-1)
        value = value.masked_fill(place >= 0, -torch.inf)
        order = falling_order(value)
        asked = best.gather(1, order)
        waits = place.gather(1, order) < 0
        asks = torch.nn.functional.one_hot(asked, experts) * waits.unsqueeze(-1)
        # Which ask of its expert this is, from 1.
        number = asks.cumsum(dim=1).gather(2, asked.unsqueeze(-1)).squeeze(-1)
        before_full = (number > room.gather(1, asked)).cumsum(dim=1) == 0
        served = asks * before_full.unsqueeze(-1)
        given = torch.where(served.any(dim=-1), asked, place.gather(1, order))
        place = place.scatter(1, order, given)
        room = room - served.sum(dim=1)
    return place
