"""Means with intervals, and paired comparisons of runs. Accuracies are in percent, differences in
points.

A comparison has two sources of chance: the seed of a run and the draw of the test images. Records
keep the prediction for each test image, so both are seen. Write y[s, i] for seed s and image i
(correctness, or its difference between two runs): y = mean + seed effect + image effect + rest. The
hierarchical bootstrap used here draws

- images: with replacement, the same draw for all seeds, from the image means over seeds (they carry
  image effect and rest);
- seeds: from Student's t with S - 1 degrees of freedom and the seed variance beyond what the rest
  explains (two-way analysis of variance; the images' draw carries the rest already). Resampling
  three seeds with replacement would be the textbook step, but it draws from three values: the
  variance is a third too small and the tails are missing.

In simulations (3 and 5 seeds, 500 and 2,000 images, seed deviations of 0 to 4 points) this covers
the true difference in 91 to 97% of cases; resampling seeds and images both ("pigeonhole") covers 84
to 100%, too wide where images dominate and too narrow where seeds do.

Fewer than three seeds: no interval.

Axis letters: **S** seeds, **I** test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as _stats

__all__ = [
    "Difference",
    "Interval",
    "MIN_SEEDS",
    "accuracy_interval",
    "beyond_line",
    "finished",
    "format_interval",
    "mean_interval",
    "paired_difference",
    "retained",
    "trend",
]

MIN_SEEDS = 3  # below, a mean gets no interval and no rank
LEVEL = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds; low and high are None where n is below MIN_SEEDS. method names the
    interval."""

    mean: float
    low: float | None
    high: float | None
    n: int
    method: str = "none"

    def __str__(self) -> str:
        return format_interval(self)


@dataclass(frozen=True)
class Difference(Interval):
    """Mean difference a - b. share_above: share of bootstrap draws above 0 (ties count half), None
    without interval. paired: True if the seeds of the two sides were paired, too (test images
    always are)."""

    share_above: float | None = None
    paired: bool = True


def format_interval(value: Interval | None, decimals: int = 1, signed: bool = False) -> str:
    """`71.3 [70.8, 71.9], n=5`; `71.3, n=1` without interval; an empty string for None."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    # -0.0 would print a sign that means nothing
    mean, low, high = (
        None if v is None else round(v, decimals) + 0.0 for v in (value.mean, value.low, value.high)
    )
    if low is None:
        return f"{mean:{sign}.{decimals}f}, n={value.n}"
    return f"{mean:{sign}.{decimals}f} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}], n={value.n}"


def mean_interval(
    values: Sequence[float], method: str | None = None, rng: np.random.Generator | None = None
) -> Interval:
    """Mean of one number per seed and its 95% interval.

    method: "t" (Student), "bca" (bias-corrected bootstrap, scipy), None = t below 10 values, bca
    from there on: with a handful of values a bootstrap interval is too narrow. ValueError for no
    values or values that are not finite.
    """
    x = np.asarray(list(values), float)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(
            f"values must be finite and at least one, got {x.tolist()}: leave failed and absent runs out first"
        )
    if method not in (None, "t", "bca"):
        raise ValueError(f"method={method!r} is unknown: use 't', 'bca' or None")
    n, mean = x.size, float(x.mean())
    if n < MIN_SEEDS:
        return Interval(mean, None, None, n)
    if np.ptp(x) == 0:
        return Interval(mean, mean, mean, n, "t 95%")
    if (method or ("t" if n < 10 else "bca")) == "t":
        half = float(_stats.t.ppf((1 + LEVEL) / 2, n - 1) * x.std(ddof=1) / np.sqrt(n))
        return Interval(mean, mean - half, mean + half, n, "t 95%")
    result = _stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=rng or np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high), n, "BCa bootstrap 95%")


def finished(records: Sequence[Any]) -> list[Any]:
    """The records that are there and ended well, in order. ValueError if one seed comes twice: it
    is not a second seed."""
    out = [r for r in records if r is not None and r.status == "ok"]
    seeds = [r.spec.seed for r in out]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds repeat: {seeds}. Give the records of one setting, one per seed")
    return out


def _correct(records: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(S, I) correctness as 0 and 1, and the (I,) labels, which must be the same for all."""
    labels = np.asarray(records[0].arrays["test_label"])
    for r in records:
        if not np.array_equal(r.arrays["test_label"], labels):
            raise ValueError(
                f"records {records[0].id} and {r.id} were tested on different images "
                f"({labels.size} and {np.size(r.arrays['test_label'])}): only equal test splits can be paired"
            )
    return np.stack([np.asarray(r.arrays["test_pred"]) == labels for r in records]).astype(
        float
    ), labels


def _seed_variance(y: np.ndarray) -> float:
    """Variance of the mean of y (S, I) that is due to the seeds alone, from mean squares; never
    negative."""
    s, i = y.shape
    rows, columns, mean = y.mean(1), y.mean(0), y.mean()
    ms_seed = i * ((rows - mean) ** 2).sum() / (s - 1)
    ms_rest = ((y - rows[:, None] - columns + mean) ** 2).sum() / max((s - 1) * (i - 1), 1)
    return max(0.0, float(ms_seed - ms_rest)) / (s * i)


def _draw_images(values: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size,) bootstrap means of (I,) values. A mean over S seeds takes few values, so their counts
    are drawn: same law."""
    unique, counts = np.unique(values.round(12), return_counts=True)
    return rng.multinomial(values.size, counts / values.size, size=size) @ unique / values.size


def _draw_seeds(y: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size,) deviations of the mean of y (S, I) due to seeds."""
    return np.sqrt(_seed_variance(y)) * rng.standard_t(y.shape[0] - 1, size=size)


def accuracy_interval(
    records: Sequence[Any], rng: np.random.Generator | None = None
) -> Interval | None:
    """Test top-1 in percent over the seeds of one setting, with the hierarchical bootstrap 95%
    interval.

    records: one per seed; absent and failed ones are left out (n shows it). None if nothing is
    left. rng: default generator 0, so that a page prints the same digits each time.
    """
    records = finished(records)
    if not records:
        return None
    y, _ = _correct(records)
    return _around(float(y.mean()), y, rng)


def paired_difference(
    records_a: Sequence[Any], records_b: Sequence[Any], rng: np.random.Generator | None = None
) -> Difference | None:
    """Test top-1 of a minus b in points, paired over test images, and over seeds where they match.

    Seeds are paired if the two sides share at least three, or have the same ones; runs with other
    seeds are then left out. Otherwise the two sides vary independently, and n is the smaller count.
    None if a side has no finished record.
    """
    a, b = finished(records_a), finished(records_b)
    if not a or not b:
        return None
    shared = sorted({r.spec.seed for r in a} & {r.spec.seed for r in b})
    paired = len(shared) >= MIN_SEEDS or len(shared) == len(a) == len(b)
    if paired:
        a, b = (
            [next(r for r in side if r.spec.seed == seed) for seed in shared] for side in (a, b)
        )
    y, _ = _correct([*a, *b])
    ya, yb = y[: len(a)], y[len(a) :]
    mean, n = 100 * float(ya.mean() - yb.mean()), min(len(a), len(b))
    if n < MIN_SEEDS:
        return Difference(mean, None, None, n, paired=paired)
    rng = rng or np.random.default_rng(0)
    draws = _draw_images(ya.mean(0) - yb.mean(0), rng, RESAMPLES)
    if paired:
        draws = draws + _draw_seeds(ya - yb, rng, RESAMPLES)
    else:
        draws = draws + _draw_seeds(ya, rng, RESAMPLES) - _draw_seeds(yb, rng, RESAMPLES)
    low, high = 100 * np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    above = float((draws > 0).mean() + 0.5 * (draws == 0).mean())
    return Difference(mean, float(low), float(high), n, "hierarchical bootstrap 95%", above, paired)


def retained(
    records: Sequence[Any], whole: Sequence[Any], rng: np.random.Generator | None = None
) -> Interval | None:
    """Test top-1 of the records in percent of that of the model they were cut from, the first
    finished one of `whole`.

    The interval is the hierarchical bootstrap's, over test images (of both, paired) and over seeds
    of the cut: the model is one. None if a side has no finished record.
    """
    done, base = finished(records), finished(whole)[:1]
    if not done or not base:
        return None
    y, _ = _correct([*done, *base])
    own, full = y[:-1], y[-1].mean()
    kept = float(own.mean() / full)
    return _around(
        kept, (own - kept * y[-1]) / full, rng
    )  # how the ratio moves with an image, to first order


def beyond_line(
    records: Sequence[Any],
    family: Sequence[Sequence[Any]],
    whole: Sequence[Any],
    size: str = "params_stored",
    rng: np.random.Generator | None = None,
) -> Interval | None:
    """Test top-1 of the records less what a family of rivals reaches at the same size, in points,
    paired over test images.

    family: groups of records, a group a level of the rival; of each the record of the same seed is
    taken, or its only one, and the first finished one of `whole` closes the line. Between two of
    them the rival is a straight line over size, an entry of `cost`; beyond the whole model it is
    the whole model. Left out: a record smaller than all of the line, or with a seed that a group of
    several lacks. The interval is the hierarchical bootstrap's. None if nothing is left.
    """
    base, levels, apart = finished(whole)[:1], [finished(group) for group in family], []
    for r in finished(records):
        line = [
            x for group in levels for x in group if len(group) == 1 or x.spec.seed == r.spec.seed
        ] + base
        line.sort(key=lambda x: x.cost[size])
        sizes = [x.cost[size] for x in line]
        if len(line) == len(family) + 1 and base and sizes[0] <= r.cost[size]:
            weight = [np.interp(r.cost[size], sizes, unit) for unit in np.eye(len(line))]
            y, _ = _correct([r, *line])
            apart.append(y[0] - weight @ y[1:])
    return _around(float(np.mean(apart)), np.stack(apart), rng) if apart else None


def _around(mean: float, y: np.ndarray, rng: np.random.Generator | None) -> Interval:
    """`mean` in percent with the spread of the mean of y (S, I) over images and seeds; no interval
    for few seeds."""
    if len(y) < MIN_SEEDS:
        return Interval(100 * mean, None, None, len(y))
    rng = rng or np.random.default_rng(0)
    draws = _draw_images(y.mean(0) - y.mean(), rng, RESAMPLES) + _draw_seeds(y, rng, RESAMPLES)
    low, high = mean + np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(
        100 * mean, 100 * float(low), 100 * float(high), len(y), "hierarchical bootstrap 95%"
    )


def trend(x: Sequence[float], rows: Sequence[Sequence[float]]) -> Interval:
    """Least-squares slope of y over x, one slope per seed, and the interval of their mean.

    x: (J,) positions, such as block numbers; rows: (S, J) values, one row per seed. Unit: that of y
    per that of x.
    """
    x, y = np.asarray(x, float), np.asarray(rows, float)
    if y.ndim != 2 or y.shape[1] != x.size or np.ptp(x) == 0:
        raise ValueError(
            f"need x (J,) with two different values and rows (S, J), got shapes {x.shape} and {y.shape}"
        )
    centred = x - x.mean()
    return mean_interval(y @ centred / (centred @ centred), method="t")
