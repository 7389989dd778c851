"""Routes by competition (CompeteSMoE; Pham et al. 2024, 2402.02526): the experts with the largest
response win, a router learns who.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **K**
experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..routers.base import Routing, Scores, assign
from ..routers.top_k import TopKRouter
from .experts import Experts
from .moe import MoELayer


class CompeteLayer(MoELayer):
    """Routes by ||E_i(x)|| in a share `rate` of the training steps, by its router in all others.

    In a step of competition every expert runs on every token; the affinities are the softmax of the
    response norms, and the K largest win, weighted as the router's `gate` says. The router takes no
    part in that step, and `competition_loss` pulls it towards the outcome. At evaluation, and in
    the other steps, the router decides alone. What wins is computed once more, so a competition
    costs E + K experts a token instead of K.
    """

    def __init__(
        self,
        router: TopKRouter,
        experts: Experts,
        shared: nn.Module | None = None,
        dropout: float = 0.0,
        channels_first: bool = False,
        *,
        rate: float,
    ):
        super().__init__(router, experts, shared, dropout, channels_first)
        if not 0 < rate <= 1:
            raise ValueError(
                f"rate={rate} is the chance that a training step competes: "
                "valid is above 0 and at most 1"
            )
        if router.per_image:
            raise ValueError(
                "competition compares responses to single tokens: "
                "give it a router with per_image=False"
            )
        if router.noise:
            raise ValueError(
                f"noise={router.noise} would count as an error of the router's prediction: "
                "set noise=0"
            )
        self.rate = rate

    def decide(self, tokens: Tensor) -> Routing:
        """Decides on tokens, (B, N, D): the logits are the router's, the probabilities those that
        decided."""
        routing = self.router(tokens)
        if not self.training or torch.rand(()) >= self.rate:
            return routing
        b, n, d = tokens.shape
        # (T, E, D) -> (T, E)
        norms = responses(self.experts, tokens.reshape(b * n, d)).float().norm(dim=-1)
        affinity = Scores(norms.softmax(dim=-1), routing.logits, norms)
        return self.router.route(affinity, (b, n))


def responses(experts: Experts, rows: Tensor) -> Tensor:
    """Runs every expert on every row: rows, (T, D) -> (T, E, D)."""
    t, e = rows.shape[0], experts.experts
    every_expert = torch.arange(e, device=rows.device).repeat(t).unsqueeze(1)  # (T*E, 1)
    blank = rows.new_zeros(1, 1).expand(t * e, e)  # probabilities that nobody reads
    routing = assign(every_expert, rows.new_ones(t * e, 1), blank, blank, (t * e, 1))
    return experts(rows.repeat_interleave(e, dim=0), routing).view(t, e, -1)


def competition_loss(routing: Routing) -> Tensor:
    """Computes the mean squared difference of the router's softmax to the affinities that decided.

    2402.02526, router loss. The affinities are a target without gradient. Zero in a step without
    competition, where both are the same.
    """
    return (routing.logits.softmax(dim=-1) - routing.probs.detach()).square().mean()
