"""Classes that look alike, and how far apart their tokens go."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.verdicts.classes import (
    class_distance,
    confusion,
    look_alike_classes,
    spaced_classes,
)


def predicted(pairs, classes=4):
    labels, predictions = np.array(pairs, dtype=np.int16).T
    return SimpleNamespace(
        class_names=[f"class_{i}" for i in range(classes)],
        arrays={"test_label": labels, "test_pred": predictions},
    )


def test_confusion_has_the_class_in_the_row():
    table = confusion(predicted([(0, 0), (0, 1), (0, 1), (2, 3)]))
    assert table.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_look_alikes_are_confused_in_either_direction():
    # 2 is confused five times, in either direction: three times with 0, twice with 3.
    # Hits count nothing: class 1 is always right.
    pairs = [(2, 0), (0, 2), (0, 2), (3, 2), (2, 3), (0, 1)] + [(1, 1)] * 9
    record = predicted(pairs)
    assert look_alike_classes(record, 2) == [2, 0]
    assert look_alike_classes(record, 3) == [2, 0, 3]


def test_spaced_classes_reach_from_end_to_end():
    assert spaced_classes(10, 4) == [0, 3, 6, 9]
    assert spaced_classes(3, 3) == [0, 1, 2]


def test_distance_is_one_for_classes_without_a_common_expert():
    counts = np.array([[8, 0, 0], [0, 4, 4], [4, 0, 0], [4, 4, 0]])
    assert class_distance(counts, [0, 1]) == pytest.approx(1.0)
    assert class_distance(counts, [0, 2]) == pytest.approx(0.0)
    # (1, 0) and (1/2, 1/2), whose mean is (3/4, 1/4): divergences from it, averaged
    divergence = 0.5 * np.log2(4 / 3) + 0.5 * (0.5 * np.log2(2 / 3) + 0.5 * np.log2(2))
    assert class_distance(counts, [0, 3]) == pytest.approx(np.sqrt(divergence))
    pairs = [class_distance(counts, pair) for pair in ((0, 1), (0, 3), (1, 3))]
    assert class_distance(counts, [0, 1, 3]) == pytest.approx(np.mean(pairs))


def test_distance_over_all_classes_has_every_pair_once():
    # two pairs of equal shares, and four pairs without a common expert
    counts = np.array([[8, 0], [2, 0], [0, 5], [0, 1]])
    assert class_distance(counts) == pytest.approx(4 / 6)
    assert class_distance(np.array([[3, 1], [6, 2], [9, 3]])) == pytest.approx(0.0, abs=1e-7)
