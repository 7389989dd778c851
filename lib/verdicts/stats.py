"""Computes means with intervals, and compares runs in pairs.

Accuracies are in percent, differences in points.

A comparison has two sources of chance: the seed of a run and the draw of the test images. Records
keep the prediction for each test image, so both are seen. Write y[s, i] for seed s and image i
(correctness, or its difference between two runs): y = mean + seed effect + image effect + rest. The
hierarchical bootstrap used here draws

- seeds: from Student's t with S - 1 degrees of freedom and the variance of the seeds' own means,
  which includes what the rest adds to it. Resampling three seeds with replacement would be the
  textbook step, but it draws from three values: the variance is a third too small and the tails are
  missing.
- images: with replacement, the same draw for all seeds, from the image means over seeds, shrunk to
  the variance of the image effect alone (two-way analysis of variance), so that the rest counts
  once.

The other way round, with the rest among the images and taken off the seeds' variance, a variance
that is small by luck becomes smaller still, often none: with three seeds and 10,000 images this
covers 90 to 92%, and gives up to one truth in fifty a p-value below 0.1%.

Two sides whose seeds differ share the images and add up the variances of their seeds, with the
degrees of freedom of Welch and Satterthwaite.

In simulations (3 and 5 seeds, 300 to 10,000 images, seed deviations of 0 to 1.5 points) these
intervals cover the truth in 94 to 97% of cases. With a prior (`moderated.SeedPrior`) of the
variance between seeds on a page, the seeds' draw has the moderated variance and its degrees of
freedom, and intervals are narrower; `coverage` simulates it. Without one all is as with a prior of
0 degrees.

Fewer than three seeds: no interval.

Axis letters: **S** seeds, **I** test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats as _stats

from .law import Law, draw_apart, draw_means

if TYPE_CHECKING:
    from .moderated import SeedPrior

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
    "same_seed",
    "second_stage",
    "seed_differences",
    "seed_of",
    "sources_of_chance",
]

MIN_SEEDS = 3  # below, a mean gets no interval and no rank
LEVEL = 0.95
RESAMPLES = 4000
MOST_SEEDS = 10  # of a second stage
CARRIES = 0.2  # below this share of a line a model adds less than a 25th of its variance to it
BOOTSTRAP = "hierarchical bootstrap"  # begins the name of an interval over seeds and test images


@dataclass(frozen=True)
class Interval:
    """Holds a mean over n seeds and the ends of its interval.

    low, high: None where n is below MIN_SEEDS. method: the name of the interval. law: that of the
    mean's deviations, for p-values; None without interval.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    method: str = "none"
    law: Law | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __str__(self) -> str:
        return format_interval(self)


@dataclass(frozen=True)
class Difference(Interval):
    """Holds a mean difference a - b.

    share_above: share of bootstrap draws above 0 (ties count half), None without interval.
    paired: whether the seeds of the two sides were paired, too (test images always are).
    """

    share_above: float | None = None
    paired: bool = True


def format_interval(
    value: Interval | None, decimals: int = 1, signed: bool = False, unit: str = ""
) -> str:
    """Writes `71.3 [70.8, 71.9], n=5`; `71.3, n=1` without interval; an empty string for None. A
    unit stands before the number of seeds: `+1.2 [0.3, 2.1] points, n=3`."""
    if value is None:
        return ""
    sign = "+" if signed else ""

    def number(x: float) -> str:
        # + 0.0 makes 0.0 of -0.0, whose sign means nothing
        return f"{round(x, decimals) + 0.0:{sign}.{decimals}f}"

    ends = "" if value.low is None else f" [{number(value.low)}, {number(value.high)}]"
    return f"{number(value.mean)}{ends}{unit and f' {unit}'}, n={value.n}"


def sources_of_chance(estimates: Sequence[Interval]) -> str:
    """Names what intervals vary over: seeds, and test images in those of test accuracy.

    Estimates without an interval do not count.
    """
    of_images = [e.method.startswith(BOOTSTRAP) for e in estimates if e.low is not None]
    if all(of_images):
        return "seeds and test images"
    return "seeds, some over test images as well" if any(of_images) else "seeds"


def mean_interval(values: Sequence[float]) -> Interval:
    """Computes the mean of one number per seed and its 95% interval, Student's t.

    It is that of any number of seeds: a bootstrap of ten or twenty values would be too narrow.
    Raises ValueError for no values, and values that are not finite.
    """
    x = np.asarray(list(values), float)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(
            f"values must be finite and at least one, got {x.tolist()}: "
            "leave failed and absent runs out first"
        )
    n, mean = x.size, float(x.mean())
    if n < MIN_SEEDS:
        return Interval(mean, None, None, n)
    # equal values differ in the last digit once their mean is taken off
    variance, degrees = float(x.var(ddof=1)) if np.ptp(x) else 0.0, float(n - 1)
    half = float(_stats.t.ppf((1 + LEVEL) / 2, degrees) * np.sqrt(variance / n))
    law = Law(mean, 0.0, variance / n, degrees)
    return Interval(mean, mean - half, mean + half, n, "t 95%", law=law)


def finished(records: Sequence[Any]) -> list[Any]:
    """Keeps the records that are there and ended well, in order.

    Raises ValueError if one seed comes twice: a repetition is not a second seed.
    """
    finished_records = [r for r in records if r is not None and r.status == "ok"]
    seeds = [r.spec.seed for r in finished_records]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds repeat: {seeds}. Give the records of one setting, one per seed")
    return finished_records


def _correct(records: Sequence[Any]) -> np.ndarray:
    """Gives the (S, I) correctness as 0.0 and 1.0; the (I,) labels must be the same for all."""
    labels = np.asarray(records[0].arrays["test_label"])
    for r in records:
        if not np.array_equal(r.arrays["test_label"], labels):
            raise ValueError(
                f"records {records[0].id} and {r.id} were tested on different images "
                f"({labels.size} and {np.size(r.arrays['test_label'])}): "
                "only equal test splits can be paired"
            )
    right = [np.asarray(r.arrays["test_pred"]) == labels for r in records]
    return np.stack(right).astype(float)


def accuracy_interval(records: Sequence[Any]) -> Interval | None:
    """Computes test top-1 over the seeds of one setting, in percent, with its 95% interval.

    The interval is the hierarchical bootstrap's.

    records: one per seed; absent and failed ones are left out (n shows it). None if nothing is
    left.
    """
    records = finished(records)
    if not records:
        return None
    y = _correct(records)
    return _around(float(y.mean()), y)


def seed_of(record: Any) -> tuple[int, str]:
    """Returns what the two records of a pair must share: the seed, and the device.

    A device rounds in its own way, so a seed on another device is another one.
    """
    return record.spec.seed, record.spec.device


def same_seed(*settings: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Returns the finished records of the seeds that all settings share, one tuple a seed.

    settings: records of one setting each, one a seed; a tuple has one record of each setting, in
    their order. Seeds come in rising order. A seed that any setting lacks, or has on another
    device, is left out, so that records of different seeds never meet.
    """
    by_seed = [{seed_of(record): record for record in finished(records)} for records in settings]
    shared = set.intersection(*map(set, by_seed))
    return [tuple(records[seed] for records in by_seed) for seed in sorted(shared)]


def _beside(records: list[Any], whole: list[Any]) -> list[Any]:
    """Keeps the records of the device of the one model that they are compared with."""
    return [record for record in records if record.spec.device == whole[0].spec.device]


def seed_differences(records_a: Sequence[Any], records_b: Sequence[Any]) -> np.ndarray | None:
    """Computes the (S,) differences of test top-1 of a minus b, one per shared seed, in points.

    None if a side has no finished record or the seeds cannot be paired (see `paired_difference`).
    """
    pairs = same_seed(records_a, records_b)
    if not pairs:
        return None
    a, b = zip(*pairs, strict=True)
    accuracies = 100 * _correct([*a, *b]).mean(1)
    return accuracies[: len(a)] - accuracies[len(a) :]


def paired_difference(
    records_a: Sequence[Any],
    records_b: Sequence[Any],
    rng: np.random.Generator | None = None,
    prior: SeedPrior | None = None,
) -> Difference | None:
    """Computes test top-1 of a minus b in points, paired over test images and, if possible, seeds.

    Seeds are paired if the two sides share any; runs with other seeds are then left out. Otherwise
    the two sides vary independently, n is the smaller count, and a prior is left out. None if a
    side has no finished record. prior: of the variance between the seeds of a paired difference, in
    squared points (`moderated.study_prior`).
    """
    a, b = finished(records_a), finished(records_b)
    if not a or not b:
        return None
    paired = same_seed(a, b)
    if paired:
        a, b = zip(*paired, strict=True)
    # (S, I) and (S', I)
    y = _correct([*a, *b])
    ya, yb = y[: len(a)], y[len(a) :]
    mean, n = 100 * float(ya.mean() - yb.mean()), min(len(a), len(b))
    if n < MIN_SEEDS:
        return Difference(mean, None, None, n, paired=bool(paired))
    rng = rng or np.random.default_rng(0)
    if paired:
        draws, law = draw_means(ya - yb, ya.mean(0) - yb.mean(0), prior, rng, RESAMPLES)
    else:
        draws, law = draw_apart(ya, yb, rng, RESAMPLES)
    low, high = 100 * np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    above = float((draws > 0).mean() + 0.5 * (draws == 0).mean())
    method = f"{BOOTSTRAP} 95%"
    if paired and prior is not None and prior.degrees > 0:
        method += ", moderated"
    law = law.in_percent(mean)
    return Difference(mean, float(low), float(high), n, method, above, bool(paired), law=law)


def retained(records: Sequence[Any], whole: Sequence[Any]) -> Interval | None:
    """Computes test top-1 of the records in percent of that of the model they were made from.

    whole: records of that model, of which the first finished one counts. The interval is the
    hierarchical bootstrap's, over test images (of both, paired) and over seeds of the records: the
    model is one. None if a side has no finished record.
    """
    smaller_models, whole_model = finished(records), finished(whole)[:1]
    if not smaller_models or not whole_model:
        return None
    smaller_models = _beside(smaller_models, whole_model)
    if not smaller_models:
        return None
    y = _correct([*smaller_models, *whole_model])
    y_smaller, y_whole = y[:-1], y[-1]
    ratio = float(y_smaller.mean() / y_whole.mean())
    # how the ratio moves with an image, to first order
    return _around(ratio, (y_smaller - ratio * y_whole) / y_whole.mean())


def beyond_line(
    records: Sequence[Any],
    family: Sequence[Sequence[Any]],
    whole: Sequence[Any],
    size: str = "params_stored",
) -> Interval | None:
    """Computes test top-1 of the records less what a rival reaches at their size, in points.

    family: the rival's records, a sequence for each of its sizes, none of them empty. Of each, the
    record of the same seed is taken, or the only one; the first finished one of `whole` closes the
    line. Between two neighbours the rival is a straight line over size, an entry of `cost`; beyond
    the whole model it is the whole model. Left out: a record smaller than all of the line, or with
    a seed that a neighbour of its size lacks. The interval is the hierarchical bootstrap's, paired
    over test images. Where a neighbour that has a share of the line of CARRIES or more ran once,
    that seed may be a lucky one: n is 1 and there is no interval, however many seeds ours has. The
    whole model is one and does not count. None if nothing is left.
    """
    whole_model = finished(whole)[:1]
    levels = [finished(level) for level in family]
    if not whole_model or not all(levels):
        return None
    levels.sort(key=lambda level: level[0].cost[size])
    differences, rival_ran_once = [], False  # (I,) for each record that has a line
    for r in finished(records):
        line = [_of_seed(level, r) for level in levels] + whole_model
        weights = _between(r.cost[size], [*(level[0] for level in levels), *whole_model], size)
        used = [at for at, weight in enumerate(weights) if weight]
        if not used or any(line[at] is None for at in used):
            continue
        y = _correct([r, *(line[at] for at in used)])
        differences.append(y[0] - weights[used] @ y[1:])
        alone = (len(level) == 1 for level in levels)
        rival_ran_once |= any(w >= CARRIES and one for w, one in zip(weights, alone, strict=False))
    if not differences:
        return None
    y = np.stack(differences)
    if rival_ran_once:
        return Interval(100 * float(y.mean()), None, None, 1)
    return _around(float(y.mean()), y)


def _of_seed(level: list[Any], record: Any) -> Any:
    """Returns the record of a level that has the seed of another, or its only one; else None."""
    same = [x for x in level if len(level) == 1 or seed_of(x) == seed_of(record)]
    return same[0] if same else None


def _between(at: float, line: list[Any], size: str) -> np.ndarray:
    """Computes the weights of the points of a line at a size: at most two are not 0, and none is
    where the size is smaller than all of them."""
    sizes = [x.cost[size] for x in line]
    if at < sizes[0]:
        return np.zeros(len(line))
    return np.array([np.interp(at, sizes, unit) for unit in np.eye(len(line))])


def _around(mean: float, y: np.ndarray) -> Interval:
    """Puts an interval around a mean by the spread of the mean of y (S, I) over images and seeds.

    mean, y: as shares; the interval is in percent, and absent with few seeds.
    """
    if len(y) < MIN_SEEDS:
        return Interval(100 * mean, None, None, len(y))
    rng = np.random.default_rng(0)  # so that a page prints the same digits each time
    draws, law = draw_means(y, y.mean(0) - y.mean(), None, rng, RESAMPLES)
    low, high = 100 * (mean + np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    law = law.in_percent(100 * mean)
    return Interval(100 * mean, float(low), float(high), len(y), f"{BOOTSTRAP} 95%", law=law)


def second_stage(estimate: Interval | None, size: float) -> int | None:
    """Computes how many seeds a claim needs in all, from its pilot (Stein 1945).

    The least number, from those of the pilot to MOST_SEEDS, whose interval is at most as wide as
    `size`, so its half at most half of it; MOST_SEEDS if none is. The variance and its degrees of
    freedom are the pilot's. What the test images add stays, however many seeds there are. None for
    an estimate without interval.
    """
    law = estimate.law if estimate is not None else None
    if law is None:
        return None
    of_seeds = _stats.t.ppf((1 + LEVEL) / 2, law.degrees) ** 2 * law.seed_variance * estimate.n
    of_images = _stats.norm.ppf((1 + LEVEL) / 2) ** 2 * law.image_variance
    for n in range(estimate.n, MOST_SEEDS):
        if np.sqrt(of_images + of_seeds / n) <= size / 2:
            return n
    return max(estimate.n, MOST_SEEDS)
