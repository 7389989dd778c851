"""Computes a mixture of experts as its formulas say, for tests.

All experts on all tokens, one einsum each, and one loop for capacity.

Axis letters: **B** images, **N** tokens, **T** = B*N, **D** width, **H** expert width, **E**
experts, **K** choices.
"""

import math

import torch
from torch import Tensor


def gates(
    x: Tensor,
    router: Tensor,
    top_k: int,
    *,
    per_image: bool = False,
    gate: str = "printed",
    capacity_factor: float | None = None,
) -> Tensor:
    """Computes (T, E) weights, zero where a token does not go; x: (B, N, D), router: (E, D)."""
    b, n, _ = x.shape
    probs = torch.softmax(torch.einsum("bnd,ed->bne", x, router), dim=-1)
    if per_image:
        probs = probs[:, :1].expand(b, n, -1)
    probs = probs.reshape(b * n, -1)
    best = probs.topk(top_k, dim=-1).indices
    mask = torch.zeros_like(probs).scatter(1, best, 1.0)
    if gate == "printed":
        out = probs * mask
    elif top_k == 1:
        out = probs / probs.detach() * mask
    else:
        out = probs * mask / (probs * mask).sum(-1, keepdim=True)
    if capacity_factor is not None:
        slots = max(1, math.ceil(capacity_factor * top_k * b * n / router.shape[0]))
        used_slots, has_slot = [0] * router.shape[0], torch.zeros_like(mask)
        for k in range(top_k):
            for t in range(b * n):
                e = int(best[t, k])
                if used_slots[e] < slots:
                    used_slots[e] += 1
                    has_slot[t, e] = 1.0
        out = out * has_slot
    return out


def moe(x: Tensor, weights: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Computes the weighted sum of all experts, (B, N, D).

    x: (B, N, D), weights: (T, E), w1: (E, H, D), b1: (E, H), w2: (E, D, H), b2: (E, D).
    """
    rows = x.reshape(-1, x.shape[-1])
    hidden = torch.nn.functional.gelu(torch.einsum("td,ehd->teh", rows, w1) + b1)
    out = torch.einsum("teh,edh->ted", hidden, w2) + b2
    return torch.einsum("te,ted->td", weights, out).view(x.shape)
