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


def _rest_variance(y: np.ndarray) -> float:
    """Estimates the variance of the mean of y (S, I) that is due to the rest, by its mean square.

    The rest is what neither a seed nor an image has by itself.
    """
    s, i = y.shape
    rest = y - y.mean(1)[:, None] - y.mean(0) + y.mean()
    return float((rest**2).sum()) / max((s - 1) * (i - 1), 1) / (s * i)


def _image_variance(image_values: np.ndarray, *sides: np.ndarray) -> float:
    """Estimates the variance of the mean of image_values (I,) that is due to the image effect.

    image_values: the mean over seeds of the only side, or the difference of those of two. sides:
    (S, I) each. Their rests are independent, also where images are shared, so both add to the
    variance of image_values; the seeds carry them already. Never negative.
    """
    whole = float(image_values.var()) / image_values.size
    return max(0.0, whole - sum(map(_rest_variance, sides)))


def _seed_variance(y: np.ndarray) -> float:
    """Computes the variance between the means (S,) of y (S, I), with what the rest adds to it.

    Where all means are equal it is what the rest alone adds: seeds that are right on different
    images, as many by luck, do vary.
    """
    means = y.mean(1)
    return float(means.var(ddof=1)) if np.ptp(means) else len(y) * _rest_variance(y)


def _draw(image_values: np.ndarray, law: Law, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws (size,) means of image_values (I,) with the spread of a law."""
    # A mean over S seeds takes few different values: drawing how often each of them comes follows
    # the same law as drawing I images, and is much faster.
    unique, counts = np.unique(image_values.round(12), return_counts=True)
    n, centre = image_values.size, image_values.mean()
    draws = rng.multinomial(n, counts / n, size=size) @ unique / n
    # the images drawn carry the rest, too, which the seeds have already
    drawn_variance = image_values.var() / n
    shrink = np.sqrt(law.image_variance / drawn_variance) if drawn_variance > 0 else 0.0
    of_seeds = np.sqrt(law.seed_variance) * rng.standard_t(law.degrees, size=size)
    return centre + shrink * (draws - centre) + of_seeds


def draw_means(
    y: np.ndarray,
    image_values: np.ndarray,
    prior: SeedPrior | None,
    rng: np.random.Generator,
    size: int,
) -> tuple[np.ndarray, Law]:
    """Draws (size,) means of image_values (I,) with the spread of y (S, I), and gives their law.

    image_values: the means of y over seeds, or these less a constant. prior: of the variance
    between seeds, in squared percent; None is one of 0 degrees. The law is around 0.
    """
    variance, degrees = _seed_variance(y), float(len(y) - 1)
    if prior is not None:
        variance, degrees = prior.moderate(1e4 * variance, degrees)
        variance *= 1e-4
    law = Law(0.0, _image_variance(image_values, y), variance / len(y), degrees)
    return _draw(image_values, law, rng, size), law


def draw_apart(
    ya: np.ndarray, yb: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, Law]:
    """Draws (size,) differences of the means of ya (S, I) and yb (S', I), whose seeds differ.

    Their law, around 0, has the degrees of freedom of Welch and Satterthwaite for the seeds.
    """
    image_values = ya.mean(0) - yb.mean(0)
    of_means = [_seed_variance(y) / len(y) for y in (ya, yb)]
    variance = sum(of_means)
    parts = sum(v**2 / (len(y) - 1) for v, y in zip(of_means, (ya, yb), strict=True))
    degrees = variance**2 / parts if parts else float(min(len(ya), len(yb)) - 1)
    law = Law(0.0, _image_variance(image_values, ya, yb), variance, degrees)
    return _draw(image_values, law, rng, size), law
