"""Time of whole models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

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
