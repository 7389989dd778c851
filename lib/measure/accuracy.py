"""Top-1 of one model, and of two on the same images, with 95% intervals over the images.

One model is one draw of all seeds, so these intervals tell what other images would change and
nothing of what another training would. Axis letters: **I** images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import binomtest

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """Holds a share of the images in percent, or a difference in points, and its interval."""

    value: float
    low: float
    high: float


def top1(correct: np.ndarray) -> Estimate:
    """Computes top-1 with Wilson's interval (1927), from which images (I,) are correct."""
    n, right = correct.size, int(correct.sum())
    interval = binomtest(right, n).proportion_ci(0.95, "wilson")
    return Estimate(100 * right / n, 100 * interval.low, 100 * interval.high)


def paired_difference(correct: np.ndarray, reference: np.ndarray) -> Estimate:
    """Computes top-1 less that of a reference on the same images, in points.

    correct, reference: (I,) which images each has right. The interval is Bonett and Price's (2012):
    Wald's, with one more image of each of the two kinds that set the models apart. So it has a
    width where the models agree on all images.
    """
    n = correct.size
    gained, lost = int((correct & ~reference).sum()), int((~correct & reference).sum())
    gains, losses = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = gains - losses
    half = Z * math.sqrt((gains + losses - centre**2) / (n + 2))
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    return Estimate(100 * (gained - lost) / n, 100 * low, 100 * high)
