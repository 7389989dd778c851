"""What one answer for all test images gets, beside what models get."""

from __future__ import annotations

import numpy as np
from factory import record

from lib.report.text import floor


def models(top1, seeds):
    """Records on 200 images, 120 of them of the same class."""
    records = [record(seed, top1=top1, classes=2) for seed in range(seeds)]
    for made in records:
        right = made.arrays["test_pred"] == made.arrays["test_label"]
        made.arrays["test_label"] = np.repeat([0, 1], [120, 80])
        made.arrays["test_pred"] = np.where(right, made.arrays["test_label"], 2)
    return records


def test_arms_that_are_not_above_the_largest_class_are_named():
    arms = {
        "none": [None],
        "high": models(95.0, 3),
        "near": models(61.0, 3),
        "one": models(50.0, 1),
    }
    said = " The most frequent class as the answer to all test images: 60.0%"
    assert floor(arms) == f"{said}; not above that, by their intervals: near."
    del arms["near"]
    assert floor(arms) == f"{said}."  # one seed has no interval
    assert floor({"none": [None]}) == floor({}) == ""
