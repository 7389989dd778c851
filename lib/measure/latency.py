"""Time of whole models, and the static model that bounds an extracted one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning.neurons.removal import remove
from .timing import Latency, compare


def latencies(
    models: Mapping[str, nn.Module], images: Tensor | Mapping[str, Tensor], repeats: int = 20
) -> dict[str, Latency]:
    """Times a forward pass over a batch, of several models in turn, after three that warm up.

    images: a batch for all, or one for each by name. Raises ValueError for less than 20 repeats.
    """
    of_models = images if isinstance(images, Mapping) else dict.fromkeys(models, images)
    calls = {name: partial(model, of_models[name]) for name, model in models.items()}
    with torch.inference_mode():
        return compare(calls, repeats)


def forward_ms(models: Mapping[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Measures the median time in ms of a forward pass over a batch, of several models in turn."""
    return {name: time.median for name, time in latencies(models, images).items()}


def static_counterpart(dense: nn.Module, layers: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Copies a dense model with MLPs as wide as what a token passes in an extracted one.

    layers: what the extraction reported of each layer; `active` is the mean number of neurons that
    a token passes. The first neurons stay, since only the time of the copy means something: it does
    the same products, and neither routes nor sorts.
    """
    widths = {layer["layer"]: max(1, round(layer["active"])) for layer in layers}
    return remove(copy.deepcopy(dense), {name: torch.arange(w) for name, w in widths.items()})
