"""The classifier fitted anew behind changed layers, in closed form.

Axis letters: **B** images, **D** width of the features, **C** classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..models.modes import modes_kept
from .closed_form import moments_of, ridge_regression


def head_of(model: nn.Module) -> nn.Linear:
    """Returns the linear classifier of a timm model. Raises ValueError if it has none."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ValueError(
            "correction.head fits a linear classifier with a bias anew, as get_classifier() of a "
            f"timm model gives it, and {type(model).__name__} has none: leave it at None"
        )
    return head


@torch.no_grad()
def features_and_logits(model: nn.Module, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Computes (B, D) what the head reads and (B, C) what it gives, in evaluation mode.

    batches: of images (channels, height, width).
    """
    features: list[Tensor] = []
    handle = head_of(model).register_forward_pre_hook(lambda _, args: features.append(args[0]))
    try:
        with modes_kept(model):
            logits = torch.cat([model.eval()(images) for images in batches])
    finally:
        handle.remove()
    return torch.cat(features).float(), logits.float()


@torch.no_grad()
def fit_head(
    model: nn.Module, batches: Iterable[Tensor], dense_logits: Tensor, penalty: float
) -> None:
    """Adds to the head, in place, what the logits lack against the dense model's.

    It is predicted from the features by ridge regression, with the penalty on the squared change of
    the weights, in units of the mean variance of the features. dense_logits: (B, C).
    """
    head = head_of(model)
    features, logits = features_and_logits(model, batches)
    weight, bias = ridge_regression(moments_of(features, dense_logits - logits), penalty)
    head.weight += weight
    head.bias += bias
