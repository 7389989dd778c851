"""Balancing: losses as functions of `Routing`, and the loss-free bias update.

Axis letters: **R** routed rows (tokens, or images under image-level routing), **E** experts, **K** choices per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routing, TopKRouter


def switch_loss(routing: Routing) -> Tensor:
    """E * sum_e f_e P_e: f_e share of first choices (no gradient), P_e mean probability (Switch 2101.03961, eq. 4).

    It is 1 at uniform load and E when one expert gets all with certainty. For K > 1 the share is taken over all R*K choices,
    the GShard reading that counts each choice once. Rows are images under image-level routing (ViMoE, eq. 6).
    """
    experts = routing.experts
    share = torch.bincount(routing.choice.reshape(-1), minlength=experts).to(routing.probs.dtype) / routing.choice.numel()
    return experts * (share * routing.probs.mean(dim=0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean over rows of logsumexp(logits)^2 (ST-MoE 2202.08906, eq. 5): keeps logits small, leaves balance alone."""
    return torch.logsumexp(routing.logits, dim=-1).square().mean()


@torch.no_grad()
def update_choice_bias(router: TopKRouter, routing: Routing, rate: float) -> None:
    """b_e += rate * sign(mean load - load_e), once a training step (loss-free balancing 2408.15664, algorithm 1).

    The bias moves the choice only. The method was published for sigmoid scores; softmax scores are smaller, so a rate
    below the published one may be needed.
    """
    counts = torch.bincount(routing.choice.reshape(-1), minlength=routing.experts).float()
    router.choice_bias += rate * torch.sign(counts.mean() - counts)
