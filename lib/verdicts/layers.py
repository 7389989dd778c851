"""Numbers that a record has for each layer, over layers, over seeds, and over pairs of experts.

A record keeps one row a layer, from the first block to the last: `moe` of routing, `extract` of an
extraction. A layer may lack a number, such as one that stayed dense: it is left out.

Axis letters: **E** experts, **M** MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..measure.routing import load_share
from .routing import load_profile
from .stats import Interval, mean_interval

Layer = Mapping[str, Any]
LayerValue = Callable[[Layer], float | None]  # one number of a layer; None = the layer has none

# With the class token in one cluster and all patches in the other, a layer of a ViT on small images
# of 16 patches sends one expert 16 of 17 tokens, and all but a few of the patches.
MOST_TOKENS, MOST_PATCHES = 0.9, 0.95


def layer_mean(layers: Sequence[Layer], value: LayerValue) -> float | None:
    """Computes the mean of a number over the layers that have it; None if no layer has."""
    return _mean(map(value, layers))


def _mean(values: Iterable[float | None]) -> float | None:
    """Computes the mean of the values that are there; None if none is."""
    there = [number for number in values if number is not None]
    return float(np.mean(there)) if there else None


def half_means(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Computes the means of the early and of the late half of the layers.

    values: one a layer, from the first to the last; None where a layer lacks the number. The middle
    one of an odd number belongs to neither half. None for a half in which no layer has it.
    """
    values = list(values)
    half = len(values) // 2
    return _mean(values[:half]), _mean(values[len(values) - half :])


def late_less_early(values: Iterable[float | None]) -> float | None:
    """Computes the mean of the late half of the layers less that of the early half.

    values: as of `half_means`. None if either half lacks the number. A picture that "rises with
    depth" is judged by it, since a slope would follow single layers at either end.
    """
    early, late = half_means(values)
    return None if early is None or late is None else late - early


def last_less_early(values: Iterable[float | None]) -> float | None:
    """Computes the number of the last layer less the mean of the early half; see `half_means`."""
    values = list(values)
    early, _ = half_means(values)
    return None if early is None or values[-1] is None else values[-1] - early


def blocks_that_part(record: Any) -> set[int]:
    """Returns the blocks, from 0, whose MoE layer sends no expert nearly all patches of test images
    (`MOST_PATCHES`): in the others experts hardly do more than tell the class token from a patch.
    """
    if not record.moe:
        return set()
    patches = load_share(record.arrays["position_expert"][:, 1:].sum(axis=1))  # (M, E)
    largest = patches.max(axis=1)
    return {
        row["block"] for row, share in zip(record.moe, largest, strict=True) if share < MOST_PATCHES
    }


def cluster_agreement(layer: Layer) -> float | None:
    """Returns how far other images give the same clusters, the `stability` of an extracted layer.

    A half of the images in which HDBSCAN finds fewer than two clusters agrees with nothing: 0. None
    where one expert gets nearly all tokens (`MOST_TOKENS`), since the class token is found anew in
    any images.
    """
    if layer["clusters"] > 1 and max(layer["load"]) >= MOST_TOKENS:
        return None
    return layer["stability"] or 0.0


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


def sorted_loads(records: Sequence[Any], block: int, points: int) -> list[Interval]:
    """Computes the sorted loads of a block's experts, as `load_profile` reads them, over seeds.

    records: one a seed, whose `moe` has a row a layer; n counts those in which the block is an MoE
    layer. block: from 0. Empty where it is one in none.
    """
    layers = [layer for record in records for layer in record.moe if layer["block"] == block]
    profiles = [load_profile(layer["load"], points) for layer in layers]
    return [mean_interval([float(load) for load in at]) for at in zip(*profiles, strict=True)]


def pair_mean(table: Sequence[Sequence[float]]) -> float | None:
    """Computes the mean over pairs of different experts of a table (E, E); None below two."""
    pairs, experts = np.asarray(table, float), len(table)
    if experts < 2:
        return None
    return float((pairs.sum() - np.trace(pairs)) / (experts * (experts - 1)))
