"""The prior of seed variances by hand and by simulation, and what it does to an interval."""

import numpy as np
import pytest
from paired_runs import right_of, runs
from scipy import stats as scipy_stats

from lib.verdicts import stats
from lib.verdicts.law import Law, draw_apart, draw_means
from lib.verdicts.moderated import (
    MIN_COMPARISONS,
    SeedPrior,
    _inverse_trigamma,
    fit_prior,
    study_prior,
)

NOTHING = SeedPrior(1.0, 0.0, 100.0)


# ---------------------------------------------------------------- the prior


def test_inverse_trigamma_by_hand():
    assert _inverse_trigamma(np.pi**2 / 6) == pytest.approx(1)  # trigamma(1)
    assert _inverse_trigamma(np.pi**2 / 2) == pytest.approx(1 / 2)  # trigamma(1/2)
    assert _inverse_trigamma(1e12) == pytest.approx(1e-4)


def test_fit_by_hand():
    """Two degrees of freedom add trigamma(1) to the variance of log s^2. Of logarithms +-a, six in
    all, the variance is 6 a^2 / 5; with twice trigamma(1) in all, trigamma(d0 / 2) is trigamma(1)
    again, d0 = 2, and s0^2 is the middle."""
    a = np.sqrt(5 * np.pi**2 / 18)
    prior = fit_prior(3 * np.exp([a, -a] * 3), [2] * 6)
    assert (prior.degrees, prior.variance) == (pytest.approx(2), pytest.approx(3))
    assert prior.all_degrees == 12
    assert prior.moderate(11.0, 2) == (pytest.approx((2 * 3 + 2 * 11) / 4), pytest.approx(4))


def test_shared_arms_count_for_less():
    """Of six comparisons with one arm in common: (6 * 2)^2 / (2 * (6 + 30 / 4)) degrees of freedom;
    as variances that go together spread less, the same spread leaves more excess."""
    a = np.sqrt(5 * np.pi**2 / 18)
    variances = np.exp([a, -a] * 3)
    star = np.full((6, 6), 0.25) + 0.75 * np.eye(6)
    prior = fit_prior(variances, [2] * 6, star)
    assert prior.all_degrees == pytest.approx(144 / 27)
    # the excess is trigamma(1) + 1/4
    assert prior.degrees == pytest.approx(2 * _inverse_trigamma(np.pi**2 / 6 + 0.25))
    arms = [runs(right_of(50 + g, 55, 60 - g), f"arm{g}") for g in range(7)]
    shared = study_prior([(arm, arms[0]) for arm in arms[1:]])
    assert shared.all_degrees == pytest.approx(144 / 27)


def test_variances_of_shared_arms_correlate_as_assumed():
    """Differences of two seeds' arms from a third: squared deviations and their logarithms."""
    arms = np.random.default_rng(0).normal(size=(100000, 3, 3))
    a, b = ((arms[:, g] - arms[:, 2]).var(axis=1, ddof=1) for g in (0, 1))
    assert np.corrcoef(a, b)[0, 1] == pytest.approx(0.25, abs=0.02)
    assert np.cov(np.log(a), np.log(b))[0, 1] == pytest.approx(0.25 * 2 / 2, abs=0.04)


def test_equal_variances_give_one_pooled_variance():
    prior = fit_prior([2.0] * 4 + [3.0] * 4, [2] * 4 + [6] * 4)
    assert prior.degrees == np.inf and prior.all_degrees == 32
    assert prior.variance == pytest.approx((2 * 2 + 6 * 3) / 8)
    # the pooled variance has the degrees of freedom of all, not infinitely many
    assert prior.moderate(99.0, 2) == (prior.variance, 32)


def test_nothing_shared_is_the_comparison_itself():
    assert NOTHING.moderate(5.0, 2) == (5.0, 2)
    few = fit_prior([1.0, 1.0, 1.0, 1.0, 1.0], [2] * 5)
    assert len([2] * 5) < MIN_COMPARISONS and few.degrees == 0
    very_unequal = fit_prior(10.0 ** np.arange(0, 60, 6), [2] * 10)
    assert very_unequal.degrees < 0.1
    assert very_unequal.moderate(1.0, 2)[1] == pytest.approx(2, abs=0.1)


def test_a_variance_of_zero_has_a_logarithm():
    prior = fit_prior([0.0, *[1.0] * 9], [2] * 10)
    assert np.isfinite([prior.variance, prior.degrees]).all() and prior.degrees > 0
    assert fit_prior([0.0] * 8, [2] * 8) == SeedPrior(0.0, 0.0, 16.0)


@pytest.mark.parametrize("d0, s02", [(2.0, 1.0), (6.0, 0.5), (20.0, 3.0)])
def test_recovery_of_the_prior(d0, s02):
    rng = np.random.default_rng(0)
    degrees = rng.choice([2, 4, 7], 20000)
    true = d0 * s02 / rng.chisquare(d0, degrees.size)
    prior = fit_prior(true * rng.chisquare(degrees) / degrees, degrees)
    assert prior.degrees == pytest.approx(d0, rel=0.15)
    assert prior.variance == pytest.approx(s02, rel=0.05)


@pytest.mark.parametrize(
    "variances, degrees, message",
    [
        ([], [], "got 0"),
        ([1.0], [2, 2], "got 1 and 2"),
        ([-1.0], [2], "0 or more"),
        ([1], [0], "1 or"),
    ],
)
def test_fit_refuses(variances, degrees, message):
    with pytest.raises(ValueError, match=message):
        fit_prior(variances, degrees)


def test_study_prior_from_records():
    """Differences of a side that is always right on half: 10, 12, 14 points: variance 4."""
    half = right_of(50, 50, 50)
    pairs = [(runs(right_of(60, 62, 64), f"a{g}"), runs(half, f"b{g}")) for g in range(7)]
    prior = study_prior(pairs)
    assert prior.variance == pytest.approx(4) and prior.all_degrees == 14
    # again, and the other way round: counted once; seeds apart, one seed, none: left out
    apart = (runs(half, "c"), runs(half, "d", seeds=[7, 8, 9]))
    one = (runs(half[:1], "e"), runs(half[:1], "f"))
    more = [
        pairs[0],
        pairs[1][::-1],
        (pairs[0][0], pairs[0][0]),
        apart,
        one,
        ([], runs(half)),
        ([None], runs(half)),
    ]
    assert study_prior([*pairs, *more]) == prior
    assert study_prior([apart, one]) is None


def test_differences_are_paired_by_seed_and_not_by_order():
    a, b = runs(right_of(60, 70, 80), "a", [0, 1, 2]), runs(right_of(75, 65, 55), "b", [2, 1, 0])
    assert stats.seed_differences(a, b) == pytest.approx([5, 5, 5])
    assert stats.seed_differences(a, b[:2]) == pytest.approx([5, 5])
    assert stats.seed_differences(a[:2], b[:1]) is None  # no seed is shared


# ---------------------------------------------------------------- intervals with it


def test_a_prior_of_no_degrees_is_none():
    """Of too few comparisons, say: nothing is shared, and the method does not claim that it is."""
    y = np.random.default_rng(3).random((6, 400)) < 0.6
    a, b = runs(y[:3], "a"), runs(y[3:], "b")
    alone = stats.paired_difference(a, b)
    assert stats.paired_difference(a, b, prior=SeedPrior(9.0, 0.0, 2.0)) == alone
    assert alone.method == "hierarchical bootstrap 95%"


@pytest.mark.parametrize("degrees, half", [(np.inf, 1.984), (2.0, 2.776)])
def test_moderated_difference_by_hand(degrees, half):
    """No image effect: one side is right on the first images, the other on more of them, and the
    difference is spread over seeds alone; t(0.975) at 100 and at 2 + 2 degrees of freedom."""
    rng = np.random.default_rng(0)
    base = np.zeros((3, 4000), bool)
    better = np.stack([rng.permutation(4000) < 4000 * share for share in (0.18, 0.20, 0.22)])
    prior = SeedPrior(4.0, degrees, 100.0)
    result = stats.paired_difference(runs(better), runs(base), prior=prior)
    assert result.mean == pytest.approx(20) and result.method.endswith("moderated")
    assert (result.high - result.low) / 2 == pytest.approx(half * 2 / np.sqrt(3), rel=0.06)
    assert result.law.below(20) == pytest.approx(0.5)
    assert result.law.below(result.low) == pytest.approx(0.025, abs=0.006)


def test_a_lucky_small_variance_is_widened_and_a_large_one_narrowed():
    base = np.zeros((3, 1000), bool)
    rng = np.random.default_rng(1)

    def width(shares, prior=None):
        better = [rng.permutation(1000) < 1000 * share for share in shares]
        result = stats.paired_difference(runs(better), runs(base), prior=prior)
        return result.high - result.low

    prior = SeedPrior(4.0, 6.0, 40.0)
    assert width((0.199, 0.2, 0.201), prior) > 1.3 * width((0.199, 0.2, 0.201))
    assert width((0.15, 0.2, 0.25), prior) < 0.5 * width((0.15, 0.2, 0.25))


def test_equal_accuracies_of_other_images_have_the_variance_of_the_rest():
    """Shares of 0.2 on images drawn anew: 0.2 * 0.8 / 1000 a seed. Equal predictions have none."""
    rng = np.random.default_rng(1)
    base = np.zeros((3, 1000), bool)
    better = np.stack([rng.permutation(1000) < 200 for _ in range(3)])
    law = stats.paired_difference(runs(better), runs(base)).law
    assert 3 * law.seed_variance == pytest.approx(1e4 * 0.16 / 1000, rel=0.05)
    assert 0 < law.below(0) < 0.01
    same = stats.paired_difference(runs(better[[0, 0, 0]]), runs(base)).law
    assert same.seed_variance == pytest.approx(0, abs=1e-20) and same.image_variance > 1


def test_a_prior_of_pairs_is_left_out_where_seeds_are_apart():
    y = np.random.default_rng(2).random((6, 300)) < 0.5
    a, b = runs(y[:3], "a"), runs(y[3:], "b", seeds=[7, 8, 9])
    prior = SeedPrior(400.0, np.inf, 100.0)
    assert stats.paired_difference(a, b, prior=prior) == stats.paired_difference(a, b)


# ---------------------------------------------------------------- the law


def test_law_at_its_limits():
    student = Law(1.0, 0.0, 4.0, 3.0)
    assert student.below(-3) == pytest.approx(scipy_stats.t.cdf(-2, 3))
    assert student.above(-3) == pytest.approx(scipy_stats.t.cdf(2, 3))
    for normal in (Law(1.0, 3.0, 1.0, np.inf), Law(1.0, 4.0, 0.0, 2.0)):
        assert normal.below(-3) == pytest.approx(scipy_stats.norm.cdf(-2))
    # hardly any image effect: Student's t, far into the tail
    assert Law(0.0, 1e-9, 1.0, 5.0).below(-40) == pytest.approx(scipy_stats.t.cdf(-40, 5), rel=1e-4)
    without = Law(1.0, 0.0, 0.0, 2.0)
    assert [without.below(x) for x in (0, 1, 2)] == [0, 0.5, 1]
    assert [without.above(x) for x in (0, 1, 2)] == [1, 0.5, 0]


def test_law_is_that_of_its_draws():
    rng = np.random.default_rng(0)
    law = Law(1.0, 0.5, 0.8, 4.0)
    draws = 1 + np.sqrt(0.5) * rng.normal(size=200000)
    draws += np.sqrt(0.8) * rng.standard_t(4, 200000)
    for value in (-4, -1, 0, 1, 3):
        assert law.below(value) == pytest.approx((draws < value).mean(), abs=0.003)
        assert law.below(value) + law.above(value) == pytest.approx(1)


def test_every_interval_has_the_law_of_its_ends():
    y = np.random.default_rng(4).random((8, 600)) < 0.7
    results = [
        stats.mean_interval([1.0, 2.0, 4.0]),
        stats.accuracy_interval(runs(y)),
        stats.paired_difference(runs(y[:4]), runs(y[4:])),
        stats.paired_difference(runs(y[:4]), runs(y[4:], seeds=[7, 8, 9, 10])),
        stats.retained(runs(y[:4]), runs(y[4:5])),
        stats.paired_difference(runs(y[:4]), runs(y[4:]), prior=SeedPrior(2.0, 5.0, 30.0)),
    ]
    for result in results:
        assert result.law.below(result.low) == pytest.approx(0.025, abs=0.008)
        assert result.law.above(result.high) == pytest.approx(0.025, abs=0.008)
    assert stats.mean_interval([1.0, 2.0]).law is None


def parts_of_law(draw, count=1000):
    """The mean variances (images, seeds) of many laws, and the variance of the means drawn from."""
    laws, means = zip(*(draw() for _ in range(count)), strict=True)
    return (
        np.mean([law.image_variance for law in laws]),
        np.mean([law.seed_variance for law in laws]),
        np.var(means),
    )


def test_each_source_of_chance_counts_once():
    """Variances of a seed 0.01, an image 1 and the rest 2. Two sides share 40 images: of a, half of
    the image effect is b's as well, so the effects differ by 0.5 + 0.5."""
    rng, i = np.random.default_rng(0), 40

    def side(image, seeds):
        seed, rest = rng.normal(0, 0.1, (seeds, 1)), rng.normal(0, np.sqrt(2), (seeds, i))
        return image + seed + rest

    def alone():
        y = side(rng.normal(size=i), 3)
        return draw_means(y, y.mean(0), None, rng, 1)[1], y.mean()

    def apart():
        shared, own = rng.normal(0, np.sqrt(0.5), i), rng.normal(0, np.sqrt(0.5), (2, i))
        ya, yb = side(shared + own[0], 3), side(shared + own[1], 4)
        return draw_apart(ya, yb, rng, 1)[1], ya.mean() - yb.mean()

    images, seeds, whole = parts_of_law(alone)
    assert images == pytest.approx(1 / 40, rel=0.06)
    assert seeds == pytest.approx((0.01 + 2 / 40) / 3, rel=0.06)
    assert images + seeds == pytest.approx(whole, rel=0.1)
    images, seeds, whole = parts_of_law(apart)
    assert images == pytest.approx(1 / 40, rel=0.06)
    assert seeds == pytest.approx((0.01 + 2 / 40) * (1 / 3 + 1 / 4), rel=0.06)
    assert images + seeds == pytest.approx(whole, rel=0.1)


def test_three_seeds_that_agree_by_luck_prove_nothing():
    """Of 400 p-values of the truth 0.4 are below 0.1%. Where what the rest explains is taken off
    the variance of the seeds, a small one becomes none, and these are many, down to 1e-14."""
    rng, p = np.random.default_rng(1), []
    for _ in range(200):
        y = rng.normal(size=(3, 50)) + rng.normal(0, 0.5, (3, 1))
        law = draw_means(y, y.mean(0), None, rng, 1)[1]
        p += [law.below(-y.mean()), law.above(-y.mean())]
    assert (np.array(p) < 0.001).sum() <= 2 and min(p) > 1e-5
