"""Estimates how far the mean of seeds and test images may lie from the truth, and draws from it.

The deviation of a mean is normal by the test images and Student's t by the seeds (`Law`). An
interval takes the quantiles of some thousand draws, in which the images are resampled. A p-value
that is corrected for a hundred claims must tell one in ten thousand from one in a hundred thousand,
which draws cannot: it comes from the law that they follow.

Axis letters: **S** seeds, **I** test images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from .moderated import SeedPrior

__all__ = ["Law", "draw_apart", "draw_means"]

TAIL = 1e-14  # of the chi-square law, left out of the integral at both ends
NODES = 2001


@dataclass(frozen=True)
class Law:
    """Holds the law of an estimate: mean + normal deviation + deviation by Student's t.

    mean: in the unit of the estimate. image_variance: of the normal deviation, in its square.
    seed_variance: the squared scale of the other one (not its variance, which t enlarges).
    degrees: of freedom of Student's t; infinity is a normal law.
    """

    mean: float
    image_variance: float
    seed_variance: float
    degrees: float

    def below(self, value: float) -> float:
        """Computes the chance that the truth is below a value: the one-sided p-value of "above it".

        At the mean of a law without spread it is one half.
        """
        distance = value - self.mean
        # the lower tail keeps its digits where the upper one, as 1 - p, loses them
        tail = self._lower_tail(-abs(distance))
        return tail if distance <= 0 else 1 - tail

    def above(self, value: float) -> float:
        """Computes the chance that the truth is above a value, with all digits of a small one."""
        return Law(-self.mean, self.image_variance, self.seed_variance, self.degrees).below(-value)

    def in_percent(self, mean: float) -> Law:
        """Returns the law of shares around another mean, all in percent."""
        return Law(mean, 1e4 * self.image_variance, 1e4 * self.seed_variance, self.degrees)

    def _lower_tail(self, distance: float) -> float:
        """Computes the chance of a deviation below a distance of 0 or less."""
        if self.image_variance + self.seed_variance == 0:
            return 0.5 if distance == 0 else 0.0
        if np.isinf(self.degrees) or self.seed_variance == 0:
            spread = np.sqrt(self.image_variance + self.seed_variance)
            return float(stats.norm.cdf(distance / spread))
        if self.image_variance == 0:
            return float(stats.t.cdf(distance / np.sqrt(self.seed_variance), self.degrees))
        # Student's t is normal given a chi-square c, with variance degrees / c. The mean over c is
        # an integral over log c, where the integrand is smooth and ends at 0 on both sides.
        chi2 = stats.chi2(self.degrees)
        log_c = np.linspace(np.log(chi2.ppf(TAIL)), np.log(chi2.isf(TAIL)), NODES)
        c = np.exp(log_c)
        spread = np.sqrt(self.image_variance + self.seed_variance * self.degrees / c)
        return float(np.trapezoid(stats.norm.cdf(distance / spread) * chi2.pdf(c) * c, log_c))


def _seed_variance(y: np.ndarray) -> float:
    """Estimates the variance of the mean of y (S, I) that is due to the seeds alone.

    From mean squares of a two-way analysis of variance; never negative.
    """
    s, i = y.shape
    rows, columns, mean = y.mean(1), y.mean(0), y.mean()
    ms_seed = i * ((rows - mean) ** 2).sum() / (s - 1)
    ms_rest = ((y - rows[:, None] - columns + mean) ** 2).sum() / max((s - 1) * (i - 1), 1)
    return max(0.0, float(ms_seed - ms_rest)) / (s * i)


def _law_of_mean(y: np.ndarray) -> Law:
    """Estimates the law of the mean of y (S, I) around 0: the images carry the rest."""
    s, i = y.shape
    return Law(0.0, float(y.mean(0).var()) / i, _seed_variance(y), s - 1)


def _moderated_law_of_mean(y: np.ndarray, prior: SeedPrior) -> Law:
    """Estimates the law of the mean of y (S, I), as shares, around 0: the seeds carry the rest.

    prior: of the variance between seeds, in squared percent.
    """
    s, i = y.shape
    rows, columns, mean = y.mean(1), y.mean(0), y.mean()
    rest = ((y - rows[:, None] - columns + mean) ** 2).sum() / max((s - 1) * (i - 1), 1)
    # of the variance of the mean over the images, what is the image effect's
    image_variance = max(0.0, float(columns.var()) / i - float(rest) / (s * i))
    variance, degrees = prior.moderate(1e4 * float(rows.var(ddof=1)), s - 1)
    return Law(0.0, image_variance, 1e-4 * variance / s, degrees)


def _draw_images(values: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws (size,) bootstrap means of (I,) values."""
    # A mean over S seeds takes few different values: drawing how often each of them comes follows
    # the same law as drawing I images, and is much faster.
    unique, counts = np.unique(values.round(12), return_counts=True)
    return rng.multinomial(values.size, counts / values.size, size=size) @ unique / values.size


def _draw_seeds(law: Law, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws (size,) deviations that are due to seeds."""
    return np.sqrt(law.seed_variance) * rng.standard_t(law.degrees, size=size)


def draw_means(
    y: np.ndarray,
    image_values: np.ndarray,
    prior: SeedPrior | None,
    rng: np.random.Generator,
    size: int,
) -> tuple[np.ndarray, Law]:
    """Draws (size,) means of image_values (I,) with the spread of y (S, I), and gives their law.

    image_values: the means of y over seeds, or these less a constant. prior: of the variance
    between seeds, in squared percent. The law is around 0.
    """
    draws = _draw_images(image_values, rng, size)
    if prior is None:
        law = _law_of_mean(y)
    else:
        law, drawn_variance = _moderated_law_of_mean(y, prior), image_values.var() / y.shape[1]
        centre = image_values.mean()
        # the draws carry the rest, too, which the moderated seeds have already
        shrink = np.sqrt(law.image_variance / drawn_variance) if drawn_variance > 0 else 0.0
        draws = centre + shrink * (draws - centre)
    return draws + _draw_seeds(law, rng, size), law


def draw_apart(
    ya: np.ndarray, yb: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, Law]:
    """Draws (size,) differences of the means of ya (S, I) and yb (S', I), whose seeds differ.

    Their law, around 0, has the degrees of freedom of Welch and Satterthwaite for the seeds.
    """
    image_values = ya.mean(0) - yb.mean(0)
    law_a, law_b = _law_of_mean(ya), _law_of_mean(yb)
    draws = _draw_images(image_values, rng, size)
    draws = draws + _draw_seeds(law_a, rng, size) - _draw_seeds(law_b, rng, size)
    variance = law_a.seed_variance + law_b.seed_variance
    parts = sum(law.seed_variance**2 / law.degrees for law in (law_a, law_b))
    degrees = variance**2 / parts if parts else min(law_a.degrees, law_b.degrees)
    return draws, Law(0.0, float(image_values.var()) / image_values.size, variance, degrees)
