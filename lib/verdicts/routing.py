"""Probes of routing: how even, how sure, how specialised. Functions of a `Routing` or of a count
table, nothing else.

The table functions need numpy alone, so a record is enough to redraw every number; `RoutingProbe`
fills such tables while a model is evaluated. Entropies and informations are in nats.

Axis letters: **B** images, **N** tokens of an image (the class token is position 0), **T** = B*N,
**E** experts, **K** experts per token, **C** classes, **M** MoE layers from the shallowest to the
deepest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..measure.routing import entropy, load_share

if TYPE_CHECKING:  # torch is not needed to read records
    pass


def cv(load: np.ndarray) -> float:
    """Coefficient of variation of the load (E,): population standard deviation / mean. 0 = even,
    sqrt(E-1) = one expert."""
    load = np.asarray(load, float)
    return float(load.std() / load.mean())


def max_vio(load: np.ndarray) -> float:
    """Largest excess (max - mean) / mean of the load (E,). 0 = even, E-1 = one expert (loss-free
    balancing, 2408.15664)."""
    load = np.asarray(load, float)
    return float(load.max() / load.mean() - 1)


@dataclass(frozen=True)
class Information:
    """What a table of attribute by expert says about specialisation.

    mutual: plug-in I(attribute; expert) in nats. normalised: I / H(expert). corrected: the same
    after the Miller-Madow term was taken from I, cut at 0. bias: that term in nats (positive: the
    plug-in value is too large). expert_entropy: H(expert) in nats, the bound of I.
    """

    mutual: float
    normalised: float
    corrected: float
    bias: float
    expert_entropy: float


def information(counts: np.ndarray, samples: int | None = None) -> Information:
    """Mutual information between rows (classes or positions) and experts of a count table (rows,
    E).

    Normalised by H(expert) (Theil's U): 1 if and only if the row decides the expert, 0 if and only
    if they are independent. The symmetric 2I / (H(row) + H(expert)) is not used: with 100 classes
    and 8 experts it ends at 2 ln 8 / (ln 100 + ln 8) = 0.62 even for a perfect router. One expert
    for everything has H(expert) = 0 and gives 0.

    The plug-in estimate is too large by about (cells - rows - columns + 1) / 2n, counting those
    that are not empty (Miller 1955). samples: n, the number of independent draws; default: the sum
    of the table, right for image-level top-1. Tokens of one image are not independent, so pass the
    number of images for token-level class tables.
    """
    table = np.asarray(counts, float)
    if table.ndim != 2 or (table < 0).any() or not table.sum() > 0:
        raise ValueError(
            f"counts must be a (rows, E) table of non-negative numbers with a positive sum, got shape "
            f"{table.shape} and sum {table.sum() if table.size else 0}"
        )
    n = table.sum() if samples is None else samples
    p = table / table.sum()
    rows, columns = p.sum(1), p.sum(0)
    h_expert = float(entropy(columns))
    mutual = max(0.0, float(entropy(rows)) + h_expert - float(entropy(p.ravel())))
    bias = (np.count_nonzero(p) - np.count_nonzero(rows) - np.count_nonzero(columns) + 1) / (2 * n)
    if h_expert < 1e-12:
        return Information(mutual, 0.0, 0.0, bias, h_expert)
    corrected = min(1.0, max(0.0, mutual - bias) / h_expert)
    return Information(mutual, min(1.0, mutual / h_expert), corrected, bias, h_expert)


def sharpness(counts: np.ndarray) -> float:
    """Mean share of a class's assignments that go to its favourite expert; (C, E) counts, classes
    with no image left out.

    Between 1/E (blurred) and 1 (each class has one expert). Unlike mutual information it is also 1
    if all classes share one expert.
    """
    table = np.asarray(counts, float)
    table = table[table.sum(1) > 0]
    return float(load_share(table).max(1).mean())


def routing_degree(experts: int, top_k: int, layers: int) -> int:
    """C(E, K)^L: the number of different expert combinations that an image can meet (ViMoE, section
    4.3)."""
    if not 1 <= top_k <= experts or layers < 0:
        raise ValueError(
            f"need 1 <= top_k <= experts and layers >= 0, got experts={experts}, top_k={top_k}, "
            f"layers={layers}"
        )
    return math.comb(experts, top_k) ** layers


def layers_for_degree(experts: int, top_k: int, degree: int) -> int:
    """Smallest L with C(E, K)^L >= degree. With C(E, K) = 1 no L suffices beyond degree 1:
    ValueError."""
    if routing_degree(experts, top_k, 1) == 1 and degree > 1:
        raise ValueError(
            f"experts={experts}, top_k={top_k} has one combination at any depth: "
            f"degree {degree} is out of reach"
        )
    layers = 0
    while routing_degree(experts, top_k, layers) < degree:
        layers += 1
    return layers


def suggested_layers(values: Sequence[float], threshold: float = 0.3) -> int:
    """Number of MoE layers worth having: the unbroken run of deepest layers that exceed the
    threshold.

    values: (M,) normalised information of class and expert, shallow to deep. The run starts at the
    deepest layer since L counts from there; a lone sharp layer further up cannot be had without
    those below it.
    """
    layers = 0
    for value in reversed(list(values)):
        if not value > threshold:
            break
        layers += 1
    return layers


def plateau_layers(accuracy: dict[int, float], tolerance: float) -> int:
    """Smallest L whose accuracy is within `tolerance` (same unit) of the best of {L: accuracy}."""
    if not accuracy:
        raise ValueError(
            "accuracy is empty: give {number of MoE layers: accuracy} with at least one entry"
        )
    best = max(accuracy.values())
    return min(layers for layers, value in accuracy.items() if value >= best - tolerance)
