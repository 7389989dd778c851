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
