"""Routers: who goes where. Every strategy ends in one `Routing`; no router touches expert weights.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **K**
experts per token, **A** assignments (T*K minus what was dropped).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """What a router decided, and nothing else. Tensors are live: losses differentiate through them.

    token: (A,) row of the (T, D) input; expert: (A,) its expert; weight: (A,) factor on the
    expert's output. probs: (R, E) router probabilities and logits: (R, E), where R = T, or B if one
    decision serves a whole image. choice: (R, K) chosen experts before any dropping, best first; -1
    where a token has fewer (expert choice). dropped: (T,) number of refused choices of a token.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    probs: Tensor
    logits: Tensor
    choice: Tensor
    dropped: Tensor
    shape: tuple[int, int]  # (B, N)

    @property
    def experts(self) -> int:
        """E."""
        return self.probs.shape[-1]

    @property
    def per_image(self) -> bool:
        """True if one decision serves all tokens of an image."""
        return self.probs.shape[0] == self.shape[0] and self.shape[1] > 1

    def load(self) -> Tensor:
        """(E,) assignments that each expert got."""
        return torch.bincount(self.expert, minlength=self.experts)

    def token_choice(self) -> Tensor:
        """(B, N, K) chosen experts of each token, best first; image-level decisions are repeated
        over tokens."""
        b, n = self.shape
        k = self.choice.shape[-1]
        if self.per_image:
            return self.choice.view(b, 1, k).expand(b, n, k)
        return self.choice.view(b, n, k)


class LinearRouter(nn.Module):
    """The part that linear routers share: a weight (E, D), float32 logits, softmax over experts.

    noise: std of normal logit noise in training, in units of 1/E (V-MoE uses 1). std: of the normal
    initialisation.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        noise: float = 0.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.experts, self.noise, self.std = experts, noise, std
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset(generator)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the router anew: normal with `std`; zero std leaves ties, which a choice breaks by
        index."""
        with torch.no_grad():
            self.weight.normal_(
                0.0, self.std, generator=generator
            ) if self.std else self.weight.zero_()

    def scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows: (R, D) -> probabilities (R, E), with noise in training, and logits (R, E) without."""
        # Router arithmetic stays in float32 under autocast: bf16 logits flip close decisions
        # (Switch, section 2.4).
        with torch.autocast(rows.device.type, enabled=False):
            logits = rows.float() @ self.weight.float().t()
        mine = self.reachable(len(rows))
        noisy = logits
        if self.training and self.noise:
            count = self.experts if mine is None else mine.sum(dim=-1, keepdim=True)
            noisy = logits + torch.randn_like(logits) * (self.noise / count)
        if mine is None:
            return noisy.softmax(dim=-1), logits
        return noisy.masked_fill(~mine, -torch.inf).softmax(dim=-1), logits.masked_fill(
            ~mine, -torch.inf
        )

    def reachable(self, rows: int) -> Tensor | None:
        """(R, E) or (E,) bool, the experts that each of R rows may reach; None: all. The others get
        probability zero."""
        return None


def capacity(factor: float, top_k: int, tokens: int, experts: int) -> int:
    """Slots per expert: ceil(factor * K * T / E), at least one."""
    return max(1, -int(-factor * top_k * tokens // experts))


def assign(
    choice: Tensor,
    weight: Tensor,
    probs: Tensor,
    logits: Tensor,
    shape: tuple[int, int],
    capacity_factor: float | None = None,
    priority: Tensor | None = None,
) -> Routing:
    """Chosen experts -> Routing. choice, weight: (R, K), with R = T, or R = B for one decision an
    image.

    Assignments are listed choice by choice (all first choices, then all second ones), and tokens by
    falling `priority`, (T,), or in their order, so that a full expert refuses the last tokens and
    lower choices first.
    """
    b, n = shape
    tokens, top_k = b * n, choice.shape[-1]
    if choice.shape[0] == b and n > 1:
        choice_t = choice.repeat_interleave(n, dim=0)
        weight_t = weight.repeat_interleave(n, dim=0)
    else:
        choice_t, weight_t = choice, weight
    queue = torch.arange(tokens, device=choice.device)
    if priority is not None:
        queue = priority.argsort(descending=True, stable=True)
        choice_t, weight_t = choice_t[queue], weight_t[queue]
    expert, flat_weight = choice_t.t().reshape(-1), weight_t.t().reshape(-1)
    token = queue.repeat(top_k)
    dropped = torch.zeros(tokens, dtype=torch.long, device=choice.device)
    if capacity_factor is not None:
        slots = capacity(capacity_factor, top_k, tokens, probs.shape[-1])
        order = torch.argsort(expert, stable=True)
        counts = torch.bincount(expert, minlength=probs.shape[-1])
        start = counts.cumsum(0) - counts
        rank = torch.empty_like(expert)
        rank[order] = torch.arange(expert.numel(), device=expert.device) - start[expert[order]]
        keep = rank < slots
        dropped.index_add_(0, token[~keep], torch.ones_like(token[~keep]))
        token, expert, flat_weight = token[keep], expert[keep], flat_weight[keep]
    return Routing(token, expert, flat_weight, probs, logits, choice, dropped, shape)
