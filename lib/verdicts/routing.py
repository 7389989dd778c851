"""Measures routing from the count tables of a record: how even and how specialised it is.

The functions need numpy alone, so a record is enough to redraw every number;
`lib.measure.routing.RoutingProbe` fills the tables while a model is evaluated. Entropies and
informations are in nats.

Axis letters: **E** experts, **K** experts per token, **L** MoE layers of a model, **C** classes,
**M** MoE layers from the shallowest to the deepest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..measure.routing import entropy, load_share


def cv(load: np.ndarray) -> float:
    """Computes the coefficient of variation of the load (E,): population deviation over mean.

    0 = even, sqrt(E - 1) = all on one expert.
    """
    load = np.asarray(load, float)
    return float(load.std() / load.mean())


def load_profile(load: np.ndarray, points: int) -> np.ndarray:
    """Reads the loads (E,), in falling order and in units of an even one, at evenly spaced experts.

    Returns (points,): the first for the most loaded ones, all 1 where loads are even. Layers of
    different E have the same points, so that they can be compared and averaged.
    """
    relative = np.sort(np.asarray(load, float))[::-1] / np.mean(load)
    expert = (np.arange(points) + 0.5) / points * len(relative)
    return relative[expert.astype(int)]


def max_vio(load: np.ndarray) -> float:
    """Computes the largest excess, (max - mean) / mean, of the load (E,).

    0 = even, E - 1 = all on one expert (MaxVio of loss-free balancing, 2408.15664).
    """
    load = np.asarray(load, float)
    return float(load.max() / load.mean() - 1)


@dataclass(frozen=True)
class Information:
    """Says how far an attribute, such as the class, and the expert determine each other.

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
    """Estimates the mutual information between rows and experts of a count table (rows, E).

    Rows are classes or positions. Raises ValueError for a table without counts.

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
            "counts must be a (rows, E) table of non-negative numbers with a positive sum, "
            f"got shape {table.shape} and sum {table.sum() if table.size else 0}"
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
    """Averages over classes the share of assignments that go to the class's favourite expert.

    counts: (C, E); classes without an image are left out. Between 1/E (blurred) and 1 (each class
    has one expert). Unlike mutual information it is also 1 if all classes share one expert.
    """
    table = np.asarray(counts, float)
    table = table[table.sum(1) > 0]
    return float(load_share(table).max(1).mean())


def routing_degree(experts: int, top_k: int, layers: int) -> int:
    """Counts the different combinations of experts that an image can meet: C(E, K)^L.

    ViMoE, section 4.3. Raises ValueError unless 1 <= K <= E and L >= 0.
    """
    if not 1 <= top_k <= experts or layers < 0:
        raise ValueError(
            f"need 1 <= top_k <= experts and layers >= 0, got experts={experts}, top_k={top_k}, "
            f"layers={layers}"
        )
    return math.comb(experts, top_k) ** layers


def layers_for_degree(experts: int, top_k: int, degree: int) -> int:
    """Finds the smallest L with C(E, K)^L >= degree.

    Raises ValueError where no L suffices: C(E, K) = 1 and a degree beyond 1.
    """
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
    """Counts the deepest layers that exceed the threshold without a break.

    That many MoE layers are worth having.

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


def plateau(accuracy_of_layers: Mapping[int, float | None], within: float = 0.0) -> int | None:
    """Finds the smallest L whose accuracy is at most `within` points below the best of a scan.

    accuracy_of_layers: {L: accuracy}. None where one of them is missing: it could be the best.
    """
    accuracies = list(accuracy_of_layers.values())
    if not accuracies or None in accuracies:
        return None
    least = max(accuracies) - within - 1e-9  # rounding must not decide between equal accuracies
    return min(layers for layers, value in accuracy_of_layers.items() if value >= least)
