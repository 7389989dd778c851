"""Intervals and paired differences of any number that a record holds, such as a loss or an entropy.

For test accuracy see `stats`: a record keeps the prediction of each test image, so that images are
resampled there as well as seeds. Here each record gives one number, and only seeds vary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .stats import Interval, finished, mean_interval, same_seed

Value = Callable[[Any], float | None]  # from a record to one of its numbers; None = it has none


def top1_after(record: Any, epoch: int = 1) -> float | None:
    """Returns validation top-1 after an epoch, in percent: how fast a model learns.

    None where training ended before.
    """
    return next((row["val_top1"] for row in record.history if row["epoch"] >= epoch), None)


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


def value_interval(records: Sequence[Any], value: Value) -> Interval | None:
    """Computes the mean of a number over the finished records of one setting and its interval.

    None without a finished record, and where one of them lacks the number.
    """
    values = [value(record) for record in finished(records)]
    return mean_interval(values) if values and None not in values else None


def value_difference(
    records_a: Sequence[Any], records_b: Sequence[Any], value: Value
) -> Interval | None:
    """Computes the mean difference a - b of a number, paired by seed, and its interval.

    The interval is that of the differences, one a shared seed. None without a shared seed, and
    where a record lacks the number.
    """
    pairs = [(value(a), value(b)) for a, b in same_seed(records_a, records_b)]
    if not pairs or any(None in pair for pair in pairs):
        return None
    return mean_interval([a - b for a, b in pairs])
