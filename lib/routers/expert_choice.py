"""Expert choice (2202.09368): experts choose their tokens, not tokens their experts.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **P**
pools of competing tokens, **C** tokens that an expert takes from each pool.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from ..spec import MoESpec
from .base import LinearRouter, Routing, capacity, check_pool, renormalised


class ExpertChoiceRouter(LinearRouter):
    """Lets each expert take its top C = c T / E tokens by softmax probability (2202.09368); a token
    may get 0 to E experts.

    choices: c, experts a token gets on average. group: "image" or "batch", the tokens that compete
    with each other. A batch as pool makes an image's result depend on its neighbours, at evaluation
    too. gate: "printed", or "renormalised" over the experts that took a token.
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
        check_pool(group)
        if not 0 < choices <= experts:
            raise ValueError(f"choices={choices} must be above 0 and at most experts={experts}")
        self.choices, self.group, self.gate = choices, group, gate

    @classmethod
    def from_spec(cls, spec: MoESpec, width: int, generator: torch.Generator | None) -> Self:
        """Makes the router, drawn from the generator."""
        return cls(
            width,
            spec.experts,
            choices=spec.choices,
            group=spec.group,
            gate=spec.gate,
            noise=spec.noise,
            std=spec.router_std,
            generator=generator,
        )

    def forward(self, x: Tensor) -> Routing:
        """Lets every expert take equally many tokens of each pool of x, (B, N, D)."""
        b, n, d = x.shape
        probs, logits, deciding = self.scores(x.reshape(b * n, d))
        chosen = self._chosen(probs, (b, n))
        token, expert = chosen.nonzero(as_tuple=True)
        weight = probs[token, expert]
        if self.gate == "renormalised":
            total = (probs * chosen).sum(dim=-1)[token]
            weight = renormalised(
                weight, total, lambda: _log_share(deciding, chosen, token, expert)
            )
        # Experts that did not take a token come last in its list, as -1.
        ranked = probs.detach().masked_fill(~chosen, -1.0).sort(dim=-1, descending=True)
        choice = ranked.indices.masked_fill(ranked.values < 0, -1)
        dropped = torch.zeros_like(choice[:, 0])
        return Routing(token, expert, weight, probs, logits, choice, dropped, (b, n))

    def factors(self, x: Tensor) -> Tensor:
        """Gives (T, E) factors: the gates of the experts that took a token."""
        b, n, d = x.shape
        probs, _, deciding = self.scores(x.reshape(b * n, d))
        chosen = self._chosen(probs, (b, n))
        if self.gate == "printed":
            return probs * chosen
        # the softmax over those that took a token; no row of a token without any
        shares = deciding.masked_fill(~chosen, -torch.inf).softmax(dim=-1)
        return torch.where(chosen, shares, torch.zeros_like(shares))

    def _chosen(self, probs: Tensor, shape: tuple[int, int]) -> Tensor:
        """Says which experts take which tokens: (T, E) bool. shape: (B, N)."""
        b, n = shape
        pools, size = (b, n) if self.group == "image" else (1, b * n)
        scores = probs.detach().view(pools, size, self.experts)  # (P, T / P, E)
        taken = scores.topk(self._slots(size), dim=1).indices  # (P, C, E): which tokens
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, taken, True)
        return chosen.view(b * n, self.experts)

    def _slots(self, pool_size: int) -> int:
        """Computes C, the tokens that each expert takes from a pool."""
        return min(pool_size, capacity(self.choices, 1, pool_size, self.experts))

    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts C rows an expert and pool."""
        pools = images if self.group == "image" else 1
        return pools * self._slots(tokens // max(1, pools)) * self.experts

    def experts_per_image(self) -> float | None:
        """Counts all experts where each image is a pool; in a pool of a batch data decide."""
        return float(self.experts) if self.group == "image" else None


def _log_share(deciding: Tensor, chosen: Tensor, token: Tensor, expert: Tensor) -> Tensor:
    """(A,) logarithm of an expert's gate in the sum of those that took the token.

    deciding: (T, E) logits; chosen: (T, E) bool; token, expert: (A,).
    """
    of_takers = deciding.masked_fill(~chosen, -torch.inf)[token]  # (A, E), no row without a taker
    return deciding[token, expert] - of_takers.logsumexp(dim=-1)
