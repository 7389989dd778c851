"""Balancing: losses as functions of `Routing`, and the loss-free bias update.

Axis letters: **R** routed rows (tokens, or images under image-level routing), **E** experts, **K**
choices per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routers.base import Routing
from ..routers.top_k import TopKRouter


def switch_loss(routing: Routing) -> Tensor:
    """Computes E * sum_e f_e P_e (Switch 2101.03961, eq. 4).

    f_e: share of first choices, without gradient; P_e: mean probability. It is 1 at uniform load
    and E when one expert gets all with certainty; E counts experts that were masked, too. For K > 1
    the share is taken over all R*K choices, the GShard reading that counts each choice once. Rows
    are images under image-level routing (ViMoE, eq. 6).
    """
    experts = routing.experts
    chosen = routing.choice[routing.choice >= 0]
    share = torch.bincount(chosen, minlength=experts).to(routing.probs.dtype) / max(
        chosen.numel(), 1
    )
    return experts * (share * routing.probs.mean(dim=0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Computes the mean over rows of logsumexp(logits)^2 (ST-MoE 2202.08906, eq. 5).

    It keeps logits small and leaves balance alone.
    """
    return torch.logsumexp(routing.logits, dim=-1).square().mean()


@torch.no_grad()
def update_choice_bias(router: TopKRouter, routing: Routing, rate: float) -> None:
    """Adds rate * sign(mean load - load_e) to the choice bias, once a training step.

    Loss-free balancing, 2408.15664, algorithm 1. The bias moves the choice only. The method was
    published for sigmoid scores; softmax scores are smaller, so a rate below the published one may
    be needed.
    """
    counts = torch.bincount(routing.choice.reshape(-1), minlength=routing.experts).float()
    router.choice_bias += rate * torch.sign(counts.mean() - counts)


# ---- Durham report: a gate that is sharp for a token and varied over images, not balanced


def sharpness_loss(routing: Routing, guard: float = 1e-2) -> Tensor:
    """Computes the mean over rows of mean(p) / (var(p) + guard), p the E probabilities of a row.

    Durham, section 3. The report calls it an inverse coefficient of variation and prints the
    variance; as printed it is E / (E - 1) for one-hot rows and 1 / (E guard) for uniform ones,
    which a tiny guard lets explode.
    """
    variance = routing.probs.var(dim=-1, unbiased=False)
    return (routing.probs.mean(dim=-1) / (variance + guard)).mean()


def variation_loss(routing: Routing, guard: float = 1e-2, deviation: bool = False) -> Tensor:
    """Computes the mean over experts of mean(s_e) / (var(s_e) + guard), over images.

    s_e: an expert's probability, summed over the tokens of one image. The report's "sum over all
    samples in a batch" is one number and has no variance; sums by image are the reading whose scale
    fits its printed values. deviation: the standard deviation instead of the variance (our
    control).
    """
    sums = _by_image(routing)
    spread = sums.std(dim=0, unbiased=False) if deviation else sums.var(dim=0, unbiased=False)
    return (sums.mean(dim=0) / (spread + guard)).mean()


def batch_variation(routing: Routing) -> Tensor:
    """Computes the report's metric: the mean over experts of var(s_e) / mean(s_e) over images.

    It is at most N (1 - 1/E): each image wholly with one expert, experts equally often.
    """
    sums = _by_image(routing)
    return (sums.var(dim=0, unbiased=False) / sums.mean(dim=0).clamp_min(1e-12)).mean()


def _by_image(routing: Routing) -> Tensor:
    """Sums probabilities over the tokens of each image: (B, E)."""
    b, n = routing.shape
    return routing.probs * n if routing.per_image else routing.probs.view(b, n, -1).sum(dim=1)
