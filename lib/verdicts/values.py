"""Intervals and paired differences of any number that a record holds, such as a loss or an entropy.

For test accuracy see `stats`: a record keeps the prediction of each test image, so that images are
resampled there as well as seeds. Here each record gives one number, and only seeds vary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .stats import Interval, finished, mean_interval, seed_of

if TYPE_CHECKING:
    from .moderated import SeedPrior

Value = Callable[[Any], float | None]  # from a record to one of its numbers; None = it has none


def first_epoch_top1(record: Any) -> float:
    """Returns validation top-1 after the first epoch, in percent: how fast a model learns."""
    return next(row["val_top1"] for row in record.history if row["epoch"] >= 1)


def best_epoch_top1(record: Any) -> float:
    """Returns the best validation top-1 of any epoch, in percent."""
    return max(row["val_top1"] for row in record.history)


def late_gain(record: Any) -> float | None:
    """Computes what the last quarter of the passes gained: mean validation top-1 over its epochs
    less that over the quarter before, in points.

    Near 0, training has stopped to gain. None where a quarter holds no epoch.
    """
    end = record.history[-1]["epoch"]
    quarters = [(0.5 * end, 0.75 * end), (0.75 * end, end)]
    means = []
    for start, stop in quarters:
        values = [row["val_top1"] for row in record.history if start < row["epoch"] <= stop]
        if not values:
            return None
        means.append(sum(values) / len(values))
    return means[1] - means[0]


def largest_class(record: Any) -> float:
    """Returns the percent of the test images that are of their most frequent class: what one answer
    for all of them gets right."""
    _, counts = np.unique(np.asarray(record.arrays["test_label"]), return_counts=True)
    return 100 * float(counts.max() / counts.sum())


def same_seed(*settings: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Returns the finished records of the seeds that all settings share, one tuple a seed.

    settings: records of one setting each, one a seed; a tuple has one record of each setting, in
    their order. Seeds come in the order of the first setting. A seed that any setting lacks, or has
    on another device, is left out, so that records of different seeds never meet.
    """
    by_seed = [{seed_of(record): record for record in finished(records)} for records in settings]
    shared = [seed for seed in by_seed[0] if all(seed in records for records in by_seed)]
    return [tuple(records[seed] for records in by_seed) for seed in shared]


def value_interval(records: Sequence[Any], value: Value) -> Interval | None:
    """Computes the mean of a number over the finished records of one setting and its interval.

    None without a finished record, and where one of them lacks the number.
    """
    values = [value(record) for record in finished(records)]
    return mean_interval(values) if values and None not in values else None


def value_difference(
    records_a: Sequence[Any],
    records_b: Sequence[Any],
    value: Value,
    prior: SeedPrior | None = None,
) -> Interval | None:
    """Computes the mean difference a - b of a number, paired by seed, and its interval.

    The interval is that of the differences, one a shared seed. prior: of the variance of such
    differences over the seeds, in the squared unit. None without a shared seed.
    """
    differences = [value(a) - value(b) for a, b in same_seed(records_a, records_b)]
    return mean_interval(differences, prior=prior) if differences else None
