"""Numbers of records: what is averaged, and which records are compared with each other."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.verdicts.stats import mean_interval
from lib.verdicts.values import (
    best_epoch_top1,
    largest_class,
    late_gain,
    same_seed,
    top1_after,
    value_difference,
    value_interval,
)


def run(seed, loss, status="ok"):
    return SimpleNamespace(status=status, spec=SimpleNamespace(seed=seed, device="cpu"), loss=loss)


def loss(record):
    return record.loss


def test_one_answer_gets_the_largest_class_right():
    labels = np.array([3, 3, 0, 3, 7, 0], np.uint8)
    assert largest_class(SimpleNamespace(arrays={"test_label": labels})) == 50.0


def test_pairs_have_equal_seeds_in_rising_order():
    a, b = [run(s, 0.0) for s in (2, 0, 1)], [run(s, 0.0) for s in (0, 1, 2)]
    assert same_seed(a, b) == [(a[1], b[0]), (a[2], b[1]), (a[0], b[2])]


def test_a_seed_that_one_setting_lacks_is_left_out():
    a = [None, run(1, 10.0), run(2, 20.0)]
    b = [run(0, 1.0), run(1, 2.0), run(2, 3.0, status="failed")]
    assert same_seed(a, b) == [(a[1], b[1])]  # by position a[1] would meet b[0]
    c = [run(1, 5.0), run(2, 6.0)]
    assert same_seed(a, b, c) == [(a[1], b[1], c[0])]
    assert same_seed(a, []) == same_seed([], a) == []


def test_one_seed_twice_is_refused():
    with pytest.raises(ValueError, match="seeds repeat"):
        same_seed([run(0, 1.0), run(0, 2.0)], [run(0, 1.0)])


def test_interval_of_a_number():
    records = [run(0, 1.0), run(1, 2.0), None, run(3, 3.0), run(4, 99.0, status="failed")]
    assert value_interval(records, loss) == mean_interval([1.0, 2.0, 3.0])
    assert value_interval([None], loss) is None
    assert value_interval([run(0, 1.0), run(1, None)], loss) is None


def test_difference_is_paired_by_seed():
    # The seeds differ by far more than the settings: paired, the difference is exact.
    a = [run(s, 100.0 * s + 1) for s in range(4)]
    b = [run(s, 100.0 * s) for s in range(4)]
    whole = value_difference(a, b, loss)
    assert (whole.mean, whole.low, whole.high, whole.n) == (1, 1, 1, 4)
    partly = value_difference([None, *a[1:]], b[::-1], loss)
    assert (partly.mean, partly.n) == (1, 3)
    assert np.sign(value_difference(b, a, loss).mean) == -1
    assert value_difference(a[:1], b[1:], loss) is None
    # what ended before the second epoch says nothing of it
    assert value_difference(a, b, lambda record: None if record is a[0] else loss(record)) is None


def test_the_first_epoch_may_end_between_two_rows():
    rows = [(0.0, 1.0), (0.5, 20.0), (1.0, 30.0), (2.0, 40.0)]
    history = [{"epoch": epoch, "val_top1": top1} for epoch, top1 in rows]
    assert top1_after(SimpleNamespace(history=history)) == 30.0
    assert top1_after(SimpleNamespace(history=[history[0], history[3]])) == 40.0
    assert top1_after(SimpleNamespace(history=history), 2) == 40.0
    assert top1_after(SimpleNamespace(history=history), 3) is None
    rows = [{"epoch": 1.0, "val_top1": 50.0}, {"epoch": 2.0, "val_top1": 45.0}]
    assert best_epoch_top1(SimpleNamespace(history=rows)) == 50.0


def test_late_gain():
    def record(*values):
        rows = [{"epoch": float(i), "val_top1": value} for i, value in enumerate(values)]
        return SimpleNamespace(history=rows)

    # eight epochs: 5 and 6 have a mean of 51, 7 and 8 of 54
    assert late_gain(record(0.0, 9.0, 9.0, 9.0, 9.0, 50.0, 52.0, 53.0, 55.0)) == 3.0
    assert late_gain(record(0.0, 10.0, 30.0, 29.0)) == -1.0  # three: the second and the third
    assert late_gain(record(0.0, 10.0)) is None
