"""Shares what the comparisons of a study know of the variance between seeds.

Three seeds estimate a variance with two degrees of freedom, so Student's t multiplies it by 4.3.
The comparisons of one study are trained alike, and all of them together say much more. Empirical
Bayes (Smyth 2004, "Linear models and empirical Bayes methods for assessing differential expression
in microarray experiments", sections 3 and 6.2) takes the true variances of the comparisons as draws
from a scaled inverse chi-square law with d0 degrees of freedom around s0^2, estimates both from the
observed variances s_g^2 with d_g degrees of freedom, and moderates each of these:

    (d0 s0^2 + d_g s_g^2) / (d0 + d_g), with d0 + d_g degrees of freedom.

d0 = 0: the study says nothing of a single comparison, and Student's t remains. d0 infinite: all
comparisons have one variance. A variance that is small by luck is widened, a large one narrowed.

Comparisons that share an arm are not independent, and a study often compares all arms with one.
Where the seeds of all arms vary alike, two such differences have a correlation of 1/2 and their
variances one of 1/4. So they spread less than independent ones, and count for less together: the
excess and the degrees of freedom of the study are corrected for it (Smyth has independent genes).

A comparison whose true variance is above that of its study is covered less often than it says, one
below more often: what holds is the average over the comparisons (`coverage`).

Axis letter: **G** comparisons of a study.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize
from scipy.special import digamma, polygamma

from .stats import seed_differences

__all__ = ["MIN_COMPARISONS", "SeedPrior", "fit_prior", "study_prior"]

# below, a study cannot tell whether its variances differ, so nothing is shared (d0 = 0)
MIN_COMPARISONS = 6
# a variance of 0 has no logarithm: none counts as less than this share of the median (as in limma)
FLOOR = 1e-5
SHARED_ARM = 1 / 4  # correlation of the variances of two comparisons that share an arm
# half of d0 is sought between these; trigamma is 1e8 and 1e-6 there
HALF_D0 = (1e-4, 1e6)


@dataclass(frozen=True)
class SeedPrior:
    """Holds what a study says of the variance between the seeds of one of its comparisons.

    variance: s0^2, in the squared unit of the comparisons (squared points of accuracy), of one
    seed and not of a mean. degrees: d0, from 0 (nothing shared) to infinity (one variance for all).
    all_degrees: degrees of freedom of all comparisons together, which no moderated variance
    exceeds (the prior itself is estimated with no more).
    """

    variance: float
    degrees: float
    all_degrees: float

    def moderate(self, variance: float, degrees: float) -> tuple[float, float]:
        """Returns the moderated variance of a comparison and its degrees of freedom.

        variance: between the seeds of the comparison, in the unit of the prior. degrees: number of
        seeds - 1.
        """
        if np.isinf(self.degrees):
            return self.variance, max(self.all_degrees, degrees)
        total = self.degrees + degrees
        moderated = (self.degrees * self.variance + degrees * variance) / total
        return moderated, max(min(total, self.all_degrees), degrees)


def fit_prior(
    variances: Sequence[float], degrees: Sequence[float], correlation: np.ndarray | None = None
) -> SeedPrior:
    """Fits the prior of a study by the moments of the logarithms of its variances.

    variances: (G,) one per comparison, 0 or more. degrees: (G,) their degrees of freedom.
    correlation: (G, G) of the variances, 1 on the diagonal; None = independent. Fewer than
    MIN_COMPARISONS share nothing. An infinite d0 goes with the pooled variance. Raises ValueError
    for unequal lengths, none at all, negative variances and degrees below 1.
    """
    s2, d = np.asarray(list(variances), float), np.asarray(list(degrees), float)
    if s2.shape != d.shape or not s2.size:
        raise ValueError(f"give one variance per degrees of freedom, got {s2.size} and {d.size}")
    if not np.isfinite(s2).all() or (s2 < 0).any() or (d < 1).any():
        raise ValueError(
            f"variances must be 0 or more and degrees of freedom 1 or more, "
            f"got {s2.tolist()} and {d.tolist()}"
        )
    pooled, all_degrees, covariance = float(d @ s2 / d.sum()), float(d.sum()), 0.0
    if correlation is not None:
        # Satterthwaite: twice the squared mean over the variance of the pooled variance.
        # Comparisons with shared seeds have as many degrees in common as the smaller one has.
        all_degrees = float(d.sum() ** 2 / (correlation * np.minimum.outer(d, d)).sum())
        # To first order the logarithms of two variances have the covariance r * 2 / d; what all
        # of them share does not spread them.
        pairs = s2.size * (s2.size - 1)
        covariance = (correlation.sum() - s2.size) / max(pairs, 1) * (2 / d).mean()
    if s2.size < MIN_COMPARISONS or np.median(s2) == 0:
        return SeedPrior(pooled, 0.0, all_degrees)
    # log s_g^2 less what its own chi-square law adds to the mean: Smyth's e_g
    e = np.log(np.maximum(s2, FLOOR * np.median(s2))) - digamma(d / 2) + np.log(d / 2)
    # variance of e beyond that of the chi-square laws = trigamma(d0 / 2)
    excess = float(e.var(ddof=1) - (polygamma(1, d / 2).mean() - covariance))
    if excess <= polygamma(1, HALF_D0[1]):
        return SeedPrior(pooled, float("inf"), all_degrees)
    half = _inverse_trigamma(excess)
    variance = float(np.exp(e.mean() + digamma(half) - np.log(half)))
    return SeedPrior(variance, 2 * half, all_degrees)


def _inverse_trigamma(value: float) -> float:
    """Finds x with trigamma(x) = value, which falls in x; x stays within HALF_D0."""
    low, high = np.log(HALF_D0)
    value = np.clip(value, polygamma(1, np.exp(high)), polygamma(1, np.exp(low)))
    # over log x, where trigamma is nearly a power, a root finder needs few steps
    return float(np.exp(optimize.brentq(lambda x: polygamma(1, np.exp(x)) - value, low, high)))


def study_prior(comparisons: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> SeedPrior | None:
    """Fits the prior of a study from the records of its comparisons, in squared points.

    comparisons: two sides each, of one record per seed; a pair of sides that comes again, also the
    other way round, counts once, and pairs that have a side in common are taken as correlated. Left
    out: sides that cannot be paired by seed, pairs with fewer than two shared seeds, and an arm
    beside itself. None if nothing is left.
    """
    differences_of = {}
    for records_a, records_b in comparisons:
        differences = seed_differences(records_a, records_b)
        sides = frozenset(frozenset(r.id for r in side if r) for side in (records_a, records_b))
        if len(sides) == 2 and differences is not None and differences.size > 1:
            differences_of[sides] = differences
    if not differences_of:
        return None
    rows = differences_of.values()
    correlation = [
        [1.0 if g == h else SHARED_ARM * (not g.isdisjoint(h)) for h in differences_of]
        for g in differences_of
    ]
    return fit_prior(
        [row.var(ddof=1) for row in rows], [row.size - 1 for row in rows], np.array(correlation)
    )
