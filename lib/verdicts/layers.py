"""Numbers that a record has for each layer, over layers, over seeds, and over pairs of experts.

A record keeps one row a layer, from the first block to the last: `moe` of routing, `extract` of an
extraction. A layer may lack a number, such as one that stayed dense: it is left out.

Axis letters: **E** experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .stats import Interval, mean_interval

Layer = Mapping[str, Any]
LayerValue = Callable[[Layer], float | None]  # one number of a layer; None = the layer has none


def layer_mean(layers: Sequence[Layer], value: LayerValue) -> float | None:
    """Computes the mean of a number over the layers that have it; None if no layer has."""
    values = [number for number in map(value, layers) if number is not None]
    return float(np.mean(values)) if values else None


def layer_intervals(
    layers_of_seeds: Sequence[Sequence[Layer]], value: LayerValue
) -> list[Interval | None]:
    """Computes the mean of a number over seeds and its interval, for each layer.

    layers_of_seeds: the layers of one record a seed, equally many. n counts the seeds whose layer
    has the number; None where no seed's has.
    """
    intervals = []
    for layer_of_seeds in zip(*layers_of_seeds, strict=True):
        values = [number for number in map(value, layer_of_seeds) if number is not None]
        intervals.append(mean_interval(values) if values else None)
    return intervals


def late_less_early(values: Sequence[float]) -> float | None:
    """Computes the mean of the late half of the layers less that of the early half.

    values: one a layer, from the first block to the last; the middle one of an odd number is in
    neither half. None below two layers. It stands for what a picture shows over depth: a slope
    would give most weight to the two ends.
    """
    half = len(values) // 2
    return float(np.mean(values[-half:]) - np.mean(values[:half])) if half else None


def last_less_early(values: Sequence[float]) -> float | None:
    """Computes the number of the last layer less the mean of the early half; see
    `late_less_early`."""
    half = len(values) // 2
    return float(values[-1] - np.mean(values[:half])) if half else None


def pair_mean(table: Sequence[Sequence[float]]) -> float | None:
    """Computes the mean over pairs of different experts of a table (E, E); None below two."""
    pairs, experts = np.asarray(table, float), len(table)
    if experts < 2:
        return None
    return float((pairs.sum() - np.trace(pairs)) / (experts * (experts - 1)))
