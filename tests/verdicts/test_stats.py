"""Intervals by hand and by simulation, and a second stage of seeds."""

from types import SimpleNamespace

import numpy as np
import paired_runs
import pytest
from paired_runs import right_of

from lib.verdicts import stats
from lib.verdicts.law import Law
from lib.verdicts.values import value_difference


def run(correct, seed=0, status="ok"):
    """A record with given correctness per image."""
    correct = np.asarray(correct, int)
    return SimpleNamespace(
        id=f"run{seed}",
        status=status,
        spec=SimpleNamespace(seed=seed, device="cpu"),
        arrays={"test_label": np.zeros(correct.size, int), "test_pred": 1 - correct},
    )


def runs(y):
    return [run(row, seed) for seed, row in enumerate(y)]


def test_student_interval_by_hand():
    result = stats.mean_interval([1, 2, 3])
    half = 4.302653 / np.sqrt(3)  # t(0.975, 2) * s / sqrt(n), s = 1
    assert (result.mean, result.n, result.method) == (2, 3, "t 95%")
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_few_values_get_no_interval():
    for values in ([71.3], [71.3, 71.3]):
        result = stats.mean_interval(values)
        assert result.low is None and result.high is None
    assert str(stats.mean_interval([71.3])) == "71.3, n=1"
    assert stats.mean_interval([2.0] * 4).low == 2.0


@pytest.mark.parametrize("n, quantile", [(9, 2.306004), (10, 2.262157), (30, 2.045230)])
def test_the_interval_is_students_at_any_number_of_values(n, quantile):
    """An interval and its p-value are of one law: they cannot disagree."""
    values = np.random.default_rng(0).normal(size=n)
    result, half = stats.mean_interval(values), quantile * values.std(ddof=1) / np.sqrt(n)
    assert (result.low, result.high) == pytest.approx((result.mean - half, result.mean + half))
    at_end = stats.mean_interval(values - result.low)  # the lower end at zero
    assert at_end.law.below(0.0) == pytest.approx(0.025)


def test_intervals_of_ten_values_cover_what_they_say():
    """A bootstrap of ten values holds the mean in 91 of 100, Student's interval in 95."""
    drawn = np.random.default_rng(1).normal(size=(2000, 10))
    held = [r.low < 0 < r.high for r in map(stats.mean_interval, drawn)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("values, says", [([], "at least one"), ([1, float("nan"), 2], "finite")])
def test_mean_interval_refuses(values, says):
    with pytest.raises(ValueError, match=says):
        stats.mean_interval(values)


def test_format():
    interval = stats.Interval(71.34, 70.81, 71.9, 5, "t 95%")
    assert stats.format_interval(interval) == "71.3 [70.8, 71.9], n=5"
    assert stats.format_interval(interval, 2, signed=True) == "+71.34 [+70.81, +71.90], n=5"
    assert stats.format_interval(None) == ""
    assert stats.format_interval(stats.Interval(-0.01, None, None, 1), signed=True) == "+0.0, n=1"


def test_accuracy_means_and_absent_records():
    y = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert stats.accuracy_interval(runs(y)).mean == 50
    failed = [*runs(y)[:1], None, run(y[1], 1, "failed")]
    one = stats.accuracy_interval(failed)
    assert (one.mean, one.low, one.n) == (50, None, 1)
    assert stats.accuracy_interval([None]) is None
    with pytest.raises(ValueError, match="seeds repeat"):
        stats.accuracy_interval([run(y[0]), run(y[1])])


def test_same_predictions_at_all_seeds_give_the_binomial_interval():
    correct = np.arange(1000) < 700
    result = stats.accuracy_interval([run(correct, s) for s in range(4)])
    half = 196 * np.sqrt(0.7 * 0.3 / 1000)
    assert (result.low, result.high) == pytest.approx((70 - half, 70 + half), abs=0.2)


def test_pairing_over_images_narrows_the_difference():
    rng = np.random.default_rng(0)
    base = rng.random((3, 2000)) < np.where(rng.random(2000) < 0.7, 0.98, 0.02)
    better = base | (rng.random((3, 2000)) < 0.02)
    difference = stats.paired_difference(runs(better), runs(base))
    single = stats.accuracy_interval(runs(base))
    assert (
        difference.paired
        and difference.n == 3
        and difference.low > 0
        and difference.share_above > 0.975
    )
    assert difference.mean == pytest.approx(100 * (better.mean() - base.mean()))
    assert difference.high - difference.low < 0.7 * (single.high - single.low)
    swapped = stats.paired_difference(runs(base), runs(better))
    assert swapped.mean == pytest.approx(-difference.mean)


def test_seeds_that_do_not_match():
    rng = np.random.default_rng(1)
    y = rng.random((7, 300)) < 0.6
    a = [run(row, s) for row, s in zip(y[:4], [0, 1, 2, 3], strict=True)]
    b = [run(row, s) for row, s in zip(y[4:], [1, 2, 3], strict=True)]
    shared = stats.paired_difference(a, b)
    assert (
        shared.paired
        and shared.n == 3
        and shared.mean == pytest.approx(100 * (y[1:4].mean() - y[4:].mean()))
    )
    apart = stats.paired_difference(
        a, [run(row, s) for row, s in zip(y[4:], [7, 8, 9], strict=True)]
    )
    assert (
        not apart.paired
        and apart.n == 3
        and apart.mean == pytest.approx(100 * (y[:4].mean() - y[4:].mean()))
    )
    assert stats.paired_difference(a[:1], b[:1]).low is None
    assert stats.paired_difference(a, [None]) is None


def test_other_test_images_are_refused():
    with pytest.raises(ValueError, match="different images"):
        stats.paired_difference([run([1, 0])], [run([1, 0, 1])])


def test_coverage_of_the_paired_difference():
    """True difference 3 points; images differ in difficulty, seeds in skill. Nominal 95%; the mean
    over four settings of 150 trials has a standard error of 1%. Resampling the seeds alone, three
    values, covers far less."""
    rng = np.random.default_rng(5)
    images, trials, hits, plain_hits = 500, 150, [], []
    for seeds, seed_sd in [(3, 0.0), (3, 0.02), (5, 0.0), (5, 0.02)]:
        for _ in range(trials):
            p = rng.beta(2, 1, images) * 0.9
            a, b = (
                rng.random((seeds, images)) < p + shift + rng.normal(0, seed_sd, (seeds, 1))
                for shift in (0.03, 0.0)
            )
            result = stats.paired_difference(
                runs(a), runs(b), np.random.default_rng(rng.integers(2**32))
            )
            hits.append(result.low <= 3 <= result.high)
            d = 100 * (a.mean(1) - b.mean(1))
            low, high = np.quantile(d[rng.integers(0, seeds, (500, seeds))].mean(1), [0.025, 0.975])
            plain_hits.append(low <= 3 <= high)
    assert 0.92 <= np.mean(hits) <= 0.98
    assert np.mean(plain_hits) < 0.88


def test_without_spread_there_is_an_interval_and_no_warning():
    everything = runs(np.ones((3, 50)))
    half = [run(np.arange(50) < 25, seed) for seed in range(3)]
    apart = [run(np.arange(50) < 25, seed) for seed in (7, 8, 9)]
    for value in (
        stats.accuracy_interval(everything),
        stats.retained(everything, everything),
        stats.paired_difference(half, half),
        stats.paired_difference(half, apart),
    ):
        assert value.low == value.high == value.mean
        # with no spread the truth is at the mean: no chance of either side there
        assert value.law.below(value.mean) == value.law.above(value.mean) == 0.5


def sized(top1, size, seed=0, status="ok", images=1000):
    """A record with a stored size, right on the first so many percent of its test images."""
    label = np.zeros(images, int)
    guess = (np.arange(images) >= round(top1 * images / 100)).astype(int)
    return SimpleNamespace(
        status=status,
        spec=SimpleNamespace(seed=seed, device="cpu"),
        cost={"params_stored": size},
        id=f"{top1}",
        arrays={"test_label": label, "test_pred": guess},
    )


def test_retained_by_hand():
    whole, cut = (
        [sized(80.0, 100)],
        [sized(value, 50, seed) for seed, value in enumerate((40.0, 60.0, 80.0))],
    )
    result = stats.retained(cut, whole)
    assert (result.mean, result.n) == (pytest.approx(75.0), 3)
    # seeds: t with 2 degrees of freedom over a standard error of 25 / sqrt(3) percent, its ends
    # drawn; images add little
    assert (result.law.seed_variance, result.law.degrees) == (pytest.approx(25**2 / 3), 2)
    assert result.high - 75 == pytest.approx(4.302653 * 25 / np.sqrt(3), rel=0.1)
    assert stats.retained(cut[:2], whole).low is None
    assert stats.retained(cut, [None]) is None and stats.retained([None], whole) is None


def test_retained_says_how_much_images_alone_may_move_it():
    """Equal seeds: the spread is that of a ratio over the same images, y right on 60% and d on
    these and 20% more."""
    images = 400
    whole, cut = (
        [sized(80.0, 100, images=images)],
        [sized(60.0, 50, seed, images=images) for seed in range(3)],
    )
    result = stats.retained(cut, whole)
    spread = np.sqrt(0.6 * 0.25**2 + 0.2 * 0.75**2) / 0.8 / np.sqrt(images)  # of (y - 0.75 d) / 0.8
    assert result.high - result.low == pytest.approx(100 * 2 * 1.96 * spread, rel=0.05)
    assert stats.retained(whole, whole).mean == 100.0


def test_beyond_the_line_of_a_family_by_hand():
    """Seed 0: from (40, 50) over (60, 70) to the whole model's (100, 80); seed 1 lies 10 points
    lower up to there."""
    family = [[sized(70.0, 60, 0), sized(60.0, 60, 1)], [sized(40.0, 40, 1), sized(50.0, 40, 0)]]
    whole = [sized(80.0, 100, seed=7)]

    def beyond(*records):
        return stats.beyond_line(records, family, whole)

    assert beyond(sized(63.0, 50, 0)).mean == pytest.approx(63 - 60)
    assert beyond(sized(63.0, 50, 1)).mean == pytest.approx(63 - 50)
    assert beyond(sized(76.0, 80, 0)).mean == pytest.approx(76 - 75)
    # Larger than the whole model: against that.
    assert beyond(sized(76.0, 140, 0)).mean == pytest.approx(76 - 80)
    both = beyond(sized(63.0, 50, 0), sized(63.0, 50, 1), sized(99.0, 30, 2))
    assert (both.mean, both.n) == (pytest.approx(8.0), 2)
    for left_out in (sized(63.0, 39, 0), sized(63.0, 50, 2), sized(63.0, 50, 0, "failed"), None):
        assert beyond(left_out) is None
    assert stats.beyond_line([sized(63.0, 50, 0)], family, [None]) is None
    only = [family[0][:1], family[1][1:]]
    assert stats.beyond_line([sized(63.0, 50, 5)], only, whole).mean == pytest.approx(63 - 60)
    three = [[sized(50.0, 40, seed) for seed in range(3)]]
    ours = [sized(70.0, 40, seed) for seed in range(3)]
    result = stats.beyond_line(ours, three, whole)
    assert result.mean == pytest.approx(20.0)
    assert result.high - result.low == pytest.approx(200 * 1.96 * 0.4 / np.sqrt(1000), rel=0.05)
    # a level that carries no weight may lack a seed, and one that carries some counts its own
    elsewhere = [*three, [sized(70.0, 60, seed=0)]]
    assert stats.beyond_line(ours, elsewhere, whole) == result
    between = [sized(70.0, 50, seed) for seed in range(3)]
    luck = stats.beyond_line(between, elsewhere, whole)
    assert (luck.mean, luck.low, luck.n) == (pytest.approx(70 - 60), None, 1)
    near = [sized(70.0, 43, seed) for seed in range(3)]  # 0.15 of the level with one seed
    small_share = stats.beyond_line(near, elsewhere, whole)
    assert (small_share.mean, small_share.n) == (pytest.approx(70 - 53), 3)
    assert small_share.low < small_share.mean < small_share.high
    fewer = stats.beyond_line(between, [*three, [sized(70.0, 60, seed) for seed in (0, 1)]], whole)
    assert (fewer.low, fewer.n) == (None, 2)  # seed 2 has no line
    assert stats.beyond_line(ours, [*three, [None]], whole) is None


def test_a_comparison_of_one_shared_seed_is_of_that_seed():
    many = paired_runs.runs(right_of(60, 90, 90), "a", [0, 1, 2])
    alone = stats.paired_difference(many, paired_runs.runs(right_of(50), "b", [0]))
    assert (alone.mean, alone.n, alone.paired) == (pytest.approx(10.0), 1, True)
    other_device = paired_runs.runs(right_of(50), "c", [0], "cuda")
    both = paired_runs.runs(right_of(70), "d", [7], "cuda")
    on_card = stats.paired_difference([*many, *both], [*other_device, *both])
    assert (on_card.mean, on_card.n) == (0.0, 1)


# ---------------------------------------------------------------- seeds on two devices


def test_a_pair_shares_seed_and_device():
    a = [
        *paired_runs.runs(right_of(60, 61), "a"),
        *paired_runs.runs(right_of(80), "c", [2], "cuda"),
    ]
    b = [*paired_runs.runs(right_of(50, 50), "b"), *paired_runs.runs(right_of(50), "d", [2])]
    for side in (a, b):
        side += paired_runs.runs(right_of(52), f"{side[0].id}-", [3], "cuda")
    # seed 2 has run on two devices, so it has no partner
    assert stats.seed_differences(a, b) == pytest.approx([10, 11, 0])
    assert stats.paired_difference(a, b).n == 3
    same = value_difference(a, b, lambda record: 100.0 * (record.spec.seed == 2))
    assert (same.mean, same.n) == (0.0, 3)


def test_a_model_of_another_device_is_not_beside_the_one_it_was_made_from():
    whole = paired_runs.runs(right_of(80), "w")
    cut = paired_runs.runs(right_of(40, 60), "c") + paired_runs.runs(right_of(1), "x", [5], "cuda")
    assert (stats.retained(cut, whole).mean, stats.retained(cut, whole).n) == (62.5, 2)
    assert stats.retained(cut[2:], whole) is None


# ---------------------------------------------------------------- a second stage of seeds


def pilot(image_variance, seed_variance, degrees=2.0):
    """Three seeds; seed_variance: of their mean."""
    law = Law(1.0, image_variance, seed_variance, degrees)
    return stats.Interval(1.0, 0.0, 2.0, 3, law=law)


def test_seeds_of_a_second_stage_by_hand():
    """Variance of a seed 3 * 0.03, t(0.975, 2) = 4.302653: half the width is 1.291 / sqrt(n)."""
    assert stats.second_stage(pilot(0.0, 0.03), 2.0) == 3  # 0.745 is at most 1
    assert stats.second_stage(pilot(0.0, 0.03), 1.2) == 5  # 0.577 at 5, 0.645 at 4
    assert stats.second_stage(pilot(0.0, 0.03), 0.1) == 10  # ten at most
    # a prior that lends degrees of freedom asks for fewer
    assert stats.second_stage(pilot(0.0, 0.03, np.inf), 0.6) == 4  # 1.96 * 0.3 / sqrt(4) = 0.294
    # what the images add stays: 1.96 * 0.2 = 0.392
    assert stats.second_stage(pilot(0.04, 0.0), 0.8) == 3
    assert stats.second_stage(pilot(0.04, 0.0), 0.7) == 10


def test_without_interval_there_is_no_second_stage():
    assert stats.second_stage(None, 1.0) is None
    assert stats.second_stage(stats.Interval(1.0, None, None, 2), 1.0) is None
