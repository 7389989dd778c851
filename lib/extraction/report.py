"""What a record says of a changed layer.

Axis letters: **n** tokens, **D** width, **E** experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.mlps import maps_of
from ..models.moe import MoELayer
from ..models.shared_experts import SharedExperts
from .record import LayerCalibration


def layer_report(
    layer: nn.Module,
    calibration: LayerCalibration,
    expert_of_token: Tensor,
    kept_neurons: Sequence[Tensor],
    centres: Tensor,
    common: int,
) -> dict[str, Any]:
    """Reports sizes, load and error of a layer.

    expert_of_token: (n,), or as many times K. kept_neurons: of each expert. centres: (E, D) mean
    inputs. common: neurons that every token passes.

    Returns clusters (E), dense (False), width (D), widths (neurons of each expert), stored (neurons
    in all, by their input weights), columns (the same by output weights, of which a neuron may have
    several), active (neurons a token passes, mean), load (share of tokens by expert), error (of the
    output, squared, over the target's variance), union (neurons in any expert), cosine (E, E) of
    mean inputs, overlap (E, E) of neuron sets (intersection over union).
    """
    widths = [len(neurons) for neurons in kept_neurons]
    load = torch.bincount(expert_of_token, minlength=len(widths)).double().cpu()
    load = load / len(expert_of_token)
    is_kept = centres.new_zeros(len(widths), int(torch.cat(list(kept_neurons)).max()) + 1)
    for row, neurons in zip(is_kept, kept_neurons, strict=True):
        row[neurons] = 1.0
    intersection = is_kept @ is_kept.t()
    union = is_kept.sum(1, keepdim=True) + is_kept.sum(1) - intersection
    directions = F.normalize(centres, dim=1)
    in_any = int(is_kept.any(dim=0).sum())
    experts = getattr(layer, "experts", None)
    one_store = isinstance(experts, SharedExperts)
    rows = in_any if one_store else sum(widths)
    columns = rows if one_store and not experts.own_output_weights else sum(widths)
    return {
        "clusters": len(widths),
        "dense": False,
        "width": centres.shape[1],
        "widths": widths,
        "stored": rows + common,
        "columns": columns + common,
        "active": float((load * torch.tensor(widths)).sum()) + common,
        "load": load.tolist(),
        "error": relative_error(layer, calibration),
        "union": in_any + common,
        "cosine": _rounded(directions @ directions.t()),
        "overlap": _rounded(intersection / union),
    }


def dense_report(mlp: nn.Module, clusters: int) -> dict[str, Any]:
    """Reports a layer that stays as it is, since fewer than two clusters were found."""
    maps = maps_of(mlp)
    neurons = maps.hidden
    return {
        "width": maps.width,
        "clusters": clusters,
        "dense": True,
        "widths": [neurons],
        "stored": neurons,
        "columns": neurons,
        "active": float(neurons),
        "load": [1.0],
        "error": 0.0,
    }


@torch.no_grad()
def relative_error(layer: nn.Module, calibration: LayerCalibration) -> float:
    """Computes the squared error of a layer's output on its tokens over the target's variance."""
    target = calibration.target
    inputs = calibration.tokens.inputs.split(4096)
    moe = isinstance(layer, MoELayer)
    if layer.channels_first if moe else maps_of(layer).channels_first:
        # (n, D) -> (1, D, n, 1) and back
        output = torch.cat([layer(part.t()[None, ..., None])[0, ..., 0].t() for part in inputs])
    else:
        output = torch.cat([layer(part.unsqueeze(0))[0] for part in inputs])
    variance = (target - target.mean(dim=0)).square().sum().clamp_min(1e-30)
    return float((output - target).square().sum() / variance)


def _rounded(matrix: Tensor) -> list[list[float]]:
    """Four decimals: a record holds two of these matrices a layer."""
    return matrix.double().round(decimals=4).tolist()
