"""Chooses the K experts with the largest softmax probability, for each token or for each image.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **R** rows that are decided on (T
or B), **D** width, **E** experts, **K** experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearRouter, Routing, assign


class TopKRouter(LinearRouter):
    """Linear router with softmax and top-k choice, for each token or for each image.

    Token level (V-MoE 2106.05974; Switch 2101.03961) reads every token; image level (ViMoE, section
    3.1) reads the class token of the normed MLP input, or the mean token, and its decision is
    shared by all tokens of the image.

    gate="printed": the weight is the softmax probability over all E experts. gate="renormalised": g
    / sum of the chosen g, which for K = 1 is g / stopgrad(g): weight one in value, while the
    router's gradient does not vanish. capacity_factor: an expert serves at most
    ceil(capacity_factor * K * T / E) assignments of a batch, earlier tokens and first choices first
    (GShard 2006.16668); None never drops. batch_priority: tokens with the largest gate first
    instead (V-MoE, section 4). With K = E and no capacity this is the dense softmax mixture.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        *,
        per_image: bool = False,
        pool: str = "class",
        gate: str = "printed",
        capacity_factor: float | None = None,
        batch_priority: bool = False,
        noise: float = 0.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ):
        super().__init__(width, experts, noise=noise, std=std, generator=generator)
        self.top_k, self.per_image, self.pool, self.gate = top_k, per_image, pool, gate
        self.capacity_factor, self.batch_priority = capacity_factor, batch_priority
        # Added to the scores for the choice only, never to the weights (loss-free balancing,
        # 2408.15664).
        self.register_buffer("choice_bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) input of the MLP -> the Routing of its T = B*N tokens."""
        b, n, d = x.shape
        if self.per_image:
            rows = x[:, 0] if self.pool == "class" else x.mean(dim=1)
        else:
            rows = x.reshape(b * n, d)
        probs, logits = self.scores(rows)
        choice = self.choose(probs)
        weight = self.weigh(probs.gather(1, choice))
        first = probs.detach().amax(dim=-1) if self.batch_priority else None
        return assign(choice, weight, probs, logits, (b, n), self.capacity_factor, first)

    @classmethod
    def like(cls, router: TopKRouter, *sizes: int) -> TopKRouter:
        """A router of this class with the parameter, bias and options of `router`. sizes: what its
        class asks for beyond K."""
        options = {
            name: getattr(router, name)
            for name in (
                "per_image",
                "pool",
                "gate",
                "capacity_factor",
                "batch_priority",
                "noise",
                "std",
            )
        }
        with torch.device("meta"):  # nothing is drawn for a weight that is replaced at once
            out = cls(router.weight.shape[1], router.experts, router.top_k, *sizes, **options)
        out.weight, out.choice_bias = router.weight, router.choice_bias
        return out.train(router.training)

    def choose(self, probs: Tensor) -> Tensor:
        """probs: (R, E) -> (R, K) chosen experts, best first; a choice bias cannot lead out of
        those that a row may reach."""
        score, mine = probs.detach() + self.choice_bias, self.reachable(len(probs))
        return (
            (score if mine is None else score.masked_fill(~mine, -torch.inf))
            .topk(self.top_k, dim=-1)
            .indices
        )

    def weigh(self, gates: Tensor) -> Tensor:
        """gates: (R, K) probabilities of the chosen experts -> (R, K) factors on their outputs, as
        `gate` says."""
        if self.gate == "printed":
            return gates
        if self.top_k == 1:
            return gates / gates.detach()
        return gates / gates.sum(dim=-1, keepdim=True)

    def extra_repr(self) -> str:
        level = f"image ({self.pool} token)" if self.per_image else "token"
        return f"experts={self.experts}, top_k={self.top_k}, level={level}, gate={self.gate}"
