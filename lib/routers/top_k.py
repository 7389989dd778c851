"""Chooses the K experts with the largest softmax probability, for each token or for each image.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **R** rows that are decided on (T
or B), **D** width, **E** experts, **K** experts per token.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import MoESpec
from .base import (
    LinearRouter,
    Routing,
    Scores,
    arguments_of,
    assign,
    capacity,
    one_in_value,
    renormalised,
)


class TopKRouter(LinearRouter):
    """Chooses the K experts with the largest softmax probability, for each token or each image.

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

    @classmethod
    def from_spec(cls, spec: MoESpec, width: int, generator: torch.Generator | None) -> Self:
        """Makes the router, drawn from the generator."""
        return cls(
            width,
            spec.experts,
            spec.top_k,
            per_image=spec.per_image,
            pool=spec.pool,
            gate=spec.gate,
            capacity_factor=spec.capacity_factor,
            batch_priority=spec.batch_priority,
            noise=spec.noise,
            std=spec.router_std,
            generator=generator,
        )

    def forward(self, x: Tensor) -> Routing:
        """Decides on x, (B, N, D), token by token or image by image."""
        return self._decided(x)

    def _decided(self, x: Tensor, limited: bool = True) -> Routing:
        b, n, d = x.shape
        if self.per_image:
            rows = x[:, 0] if self.pool == "class" else x.mean(dim=1)
        else:
            rows = x.reshape(b * n, d)
        return self.route(self.scores(rows), (b, n), limited)

    def route(self, scores: Scores, shape: tuple[int, int], limited: bool = True) -> Routing:
        """Chooses and weighs experts by scores as this router's options say.

        shape: (B, N). limited: whether full experts refuse tokens.
        """
        probs, logits, deciding = scores
        choice = self.choose(probs)
        weight = self.weigh(probs.gather(1, choice), deciding, choice)
        first = probs.detach().amax(dim=-1) if self.batch_priority else None
        limit = self.capacity_factor if limited else None
        return assign(choice, weight, probs, logits, shape, limit, first)

    @classmethod
    def like(cls, router: TopKRouter, **sizes: int) -> Self:
        """Makes a router of this class with the parameter, bias and options of `router`.

        sizes: what its class asks for beyond those.
        """
        names = arguments_of(TopKRouter) - {"generator"}
        options = {name: getattr(router, name) for name in names}
        with torch.device("meta"):  # nothing is drawn for a weight that is replaced at once
            out = cls(**options, **sizes)
        out.weight, out.choice_bias = router.weight, router.choice_bias
        return out.train(router.training)

    def factors(self, x: Tensor) -> Tensor:
        """Gives (T, E) factors; where an expert was full, the factor is 0 in place of a gap."""
        if self.capacity_factor is None:
            return super().factors(x)
        routing = self._decided(x, limited=False)  # in the order in which experts take tokens
        slots = capacity(self.capacity_factor, self.top_k, x.shape[0] * x.shape[1], self.experts)
        # the place of an assignment among those of its expert, counted from 1: (A, E) -> (A,)
        line = F.one_hot(routing.expert, self.experts).cumsum(dim=0)
        place = line.gather(1, routing.expert.unsqueeze(1)).squeeze(1)
        weight = routing.weight * (place <= slots)
        blank = weight.new_zeros(x.shape[0] * x.shape[1], self.experts)
        return blank.index_put((routing.token, routing.expert), weight, accumulate=True)

    def choose(self, probs: Tensor) -> Tensor:
        """Chooses the K experts of each row, best first: probs, (R, E) -> (R, K).

        A choice bias cannot lead out of the experts that a row may reach.
        """
        biased, reachable = probs.detach() + self.choice_bias, self.reachable(probs.shape[0])
        if reachable is not None:
            biased = biased.masked_fill(~reachable, -torch.inf)
        return biased.topk(self.top_k, dim=-1).indices

    def weigh(self, gates: Tensor, deciding: Tensor, choice: Tensor) -> Tensor:
        """Turns the probabilities of the chosen experts, (R, K), into factors on their outputs,
        (R, K), as `gate` says.

        deciding: (R, E) logits of the probabilities; choice: (R, K).
        """
        if self.gate == "printed":
            return gates
        if self.top_k == 1:
            return one_in_value(gates, deciding, choice)
        # the softmax over the chosen alone
        return renormalised(
            gates,
            gates.sum(dim=-1, keepdim=True),
            lambda: deciding.gather(1, choice).log_softmax(dim=-1),
        )

    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts every token once for each of its K experts."""
        return tokens * self.top_k

    def experts_per_image(self) -> int | None:
        """Counts K where all tokens of an image share a decision or pass all; else data decide."""
        return self.top_k if self.per_image or self.top_k == self.experts else None

    def decision_macs(self, tokens: int, images: int) -> int:
        """Counts one product with the weight a decision."""
        return super().decision_macs(images if self.per_image else tokens, images)

    def extra_repr(self) -> str:
        level = f"image ({self.pool} token)" if self.per_image else "token"
        return f"experts={self.experts}, top_k={self.top_k}, level={level}, gate={self.gate}"
