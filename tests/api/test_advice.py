"""The sentence below the table, from tables written by hand."""

import pandas as pd
import pytest

import lib

FIRST = {"difference": 0.0, "difference_low": 0.0, "difference_high": 0.0}


def table(**rows):
    """rows: difference, half its interval, and ms at 32, of each model; a dense one comes first,
    with a median of 2 and a low quantile of 1.9 ms."""
    dense = FIRST | {"ms_1": 9.0, "ms_1_q10": 8.0, "ms_32": 2.0, "ms_32_q10": 1.9}
    made = {"dense": dense}
    for name, (difference, half, ms) in rows.items():
        ends = {"difference_low": difference - half, "difference_high": difference + half}
        times = {"ms_1": 10.0, "ms_1_q10": 9.5, "ms_32": ms, "ms_32_q10": 0.9 * ms}
        made[name] = {"difference": difference} | ends | times
    return pd.DataFrame.from_dict(made, orient="index")


def test_the_fastest_within_the_points_is_taken():
    frame = table(slow=(0.5, 0.4, 1.8), good=(-1.0, 0.5, 1.0), lossy=(-9.0, 0.5, 0.5))
    assert lib.advice(frame) == (
        "Take good: on this machine, in batches of 32, it takes 1 ms an image where dense takes "
        "2 (2.00 times as fast), for -1.0 points of top-1 [-1.5, -0.5]."
    )
    assert lib.advice(frame, points=0.5).startswith("Take slow: ")
    assert lib.advice(frame, points=10).startswith("Take lossy: ")


def test_of_models_that_are_level_in_time_the_one_that_loses_least_is_taken():
    # low quantiles are 0.9 of the median: 1.1 reaches down to 0.99, and 1.2 to 1.08
    frame = table(fast=(-0.8, 0.1, 1.0), level=(-0.2, 0.1, 1.1), slower=(0.5, 0.1, 1.2))
    assert lib.advice(frame) == (
        "Take level: on this machine, in batches of 32, it takes 1.1 ms an image where dense takes "
        "2 (1.82 times as fast), for -0.2 points of top-1 [-0.3, -0.1]; fast (1 ms) is level with "
        "it in time."
    )
    worse = table(fast=(-0.2, 0.1, 1.0), level=(-0.8, 0.1, 1.1))
    assert lib.advice(worse).startswith("Take fast: ") and "level" not in lib.advice(worse)
    # one that loses too much is not there, whoever it is level with
    costly = table(costly=(-5.0, 0.1, 0.95), fast=(-0.8, 0.1, 1.0), level=(-0.2, 0.1, 1.1))
    assert lib.advice(costly) == lib.advice(frame)


def test_the_first_row_is_the_baseline_and_the_same_layers_again_only_a_bar():
    frame = table(again=(0.1, 0.5, 1.8), small=(-0.2, 0.1, 1.5))
    got = lib.advice(frame, again="again")
    assert got.startswith("Take small: ")
    assert "it takes 1.5 ms an image where dense takes 2 (1.33 times as fast)" in got
    within = table(again=(0.1, 0.5, 1.8), small=(-0.2, 0.1, 1.65))  # above 1.62
    assert lib.advice(within, again="again") == (
        "On this machine, in batches of 32, nothing here makes dense faster by more than times "
        "scatter (a tenth of the times of again is below 1.62 ms): small comes nearest, as it "
        "takes 1.65 ms an image where dense takes 2 (1.21 times as fast), for -0.2 points of top-1 "
        "[-0.3, -0.1]."
    )
    with pytest.raises(ValueError, match="the table has 1 row"):
        lib.advice(table(again=(0.1, 0.5, 1.8)), again="again")


def test_a_loss_that_the_images_leave_open_is_said():
    frame = table(unsure=(-1.0, 1.5, 1.0))
    assert lib.advice(frame).endswith("; the images do not exclude a loss of 2 points.")
    assert "exclude" not in lib.advice(frame, points=3)


def test_nothing_within_the_points():
    frame = table(static=(-3.1, 0.5, 1.25), lossy=(-9.0, 0.5, 0.5), slower=(0.5, 0.1, 2.5))
    assert lib.advice(frame) == (
        "On this machine, in batches of 32, nothing here makes dense faster at under 2 points: "
        "static comes nearest, as it takes 1.25 ms an image where dense takes 2 (1.60 times as "
        "fast), for -3.1 points of top-1 [-3.6, -2.6]."
    )
    # a loss of exactly the limit is not under it
    assert "static comes nearest" in lib.advice(frame, points=3.1)


def test_nothing_faster_than_the_noise():
    frame = table(mixture=(0.2, 0.5, 2.6), equal=(-0.1, 0.5, 1.95))
    got = lib.advice(frame)
    assert "nothing here makes dense faster by more than times scatter (a tenth of the " in got
    assert "of dense is below 1.9 ms): equal comes nearest" in got
    assert "nothing here makes dense faster: mixture comes nearest" in lib.advice(frame, batch=1)


@pytest.mark.parametrize(
    "frame, batch, message",
    [
        (table(), None, "the table has 1 row"),
        (table(small=(0.0, 1.0, 1.0)), 8, r"batch=8: the table has times of batches of \[1, 32\]"),
        (table(small=(0.0, 1.0, 1.0))[list(FIRST)], None, r"of batches of \[\]"),
    ],
)
def test_tables_that_say_too_little_are_refused(frame, batch, message):
    with pytest.raises(ValueError, match=message):
        lib.advice(frame, batch=batch)
