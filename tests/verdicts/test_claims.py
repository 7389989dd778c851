"""The rule against a published size, each branch and boundary by hand, and many claims at once."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lib.report import text
from lib.verdicts import MARKS, WORDS, claims
from lib.verdicts.law import Law
from lib.verdicts.many import BY_CHANCE, corrected
from lib.verdicts.stats import Difference, Interval


def estimate(low, high, n=3):
    return Interval((low + high) / 2, low, high, n, "t 95%", law=Law(0.0, 1.0, 1.0, 2.0))


# of a published size of 2 points
RULE = [
    (0.1, 3.0, "holds"),
    (0.1, 1.9, "holds, smaller than published"),
    (0.1, 2.0, "holds"),  # an end at the size is inside
    (2.5, 3.0, "holds"),  # larger than published
    (0.0, 1.9, "not reproduced"),  # an end at 0 is inside
    (-1.0, 1.9, "not reproduced"),
    (-1.0, 0.0, "not reproduced"),
    (0.0, 0.0, "not reproduced"),  # a true null, ten seeds that agree
    (-1.0, -0.1, "opposite"),
    (-9.0, -3.0, "opposite"),
    (-1.0, 2.0, "undecided"),
    (0.0, 2.0, "undecided"),
    (-1.0, 3.0, "undecided"),
]


def test_where_nothing_is_published_a_small_effect_is_below_what_counts():
    for (low, high), verdict in {
        (0.1, 1.9): "holds, below what counts",
        (0.1, 3.0): "holds",
        (-1.0, 1.9): "not reproduced",
        (-1.0, 3.0): "undecided",
    }.items():
        found = claims.judge("c", estimate(low, high), "greater", 2.0, published=False)
        assert found.verdict == verdict
        other = claims.judge("c", estimate(-high, -low), "less", 2.0, published=False)
        assert other.verdict == verdict and other.holds == verdict.startswith("holds")
    small = claims.judge("c", estimate(0.1, 1.9), "greater", 2.0, published=False)
    smaller = claims.judge("c", estimate(0.1, 1.9), "greater", 2.0)
    assert claims.judge_jointly("both", [smaller, small]).verdict == "holds, below what counts"


@pytest.mark.parametrize("low, high, verdict", RULE)
def test_directional_claims(low, high, verdict):
    assert claims.judge("c", estimate(low, high), "greater", 2.0).verdict == verdict
    assert claims.judge("c", estimate(-high, -low), "less", 2.0).verdict == verdict


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (-0.9, 0.9, "holds"),
        (0.2, 0.9, "holds"),  # another value than 0, but within the band
        (-1.0, 0.9, "undecided"),
        (-0.9, 1.0, "undecided"),
        (0.5, 1.5, "undecided"),
        (-2.0, 2.0, "undecided"),
        (1.0, 1.5, "undecided"),
        (1.1, 1.5, "not reproduced"),
        (-1.5, -1.1, "not reproduced"),
        (-1.5, -1.0, "undecided"),
    ],
)
def test_equality_by_its_band(low, high, verdict):
    assert claims.judge("c", estimate(low, high), "equal", 1.0).verdict == verdict


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (-0.9, 0.1, "holds"),
        (-0.9, 5.0, "holds"),
        (3.0, 5.0, "holds"),  # a gain never fails it
        (-1.0, 5.0, "undecided"),
        (-1.5, -1.0, "undecided"),
        (-1.5, -0.5, "undecided"),
        (-1.5, -1.1, "not reproduced"),
    ],
)
def test_not_worse_has_one_side(low, high, verdict):
    assert claims.judge("c", estimate(low, high), "not worse", 1.0).verdict == verdict


def test_without_interval_or_records():
    none = claims.judge("c", None, "greater", 2.0)
    assert (none.verdict, none.text, none.n, none.p) == ("not tested", "no records", 0, None)
    one = claims.judge("c", Interval(5.0, None, None, 1), "greater", 2.0)
    assert (one.verdict, one.p) == ("undecided", None)
    assert one.text == "+5.0 points, n=1; one seed claims no order"
    two = claims.judge("c", Interval(5.0, None, None, 2), "equal", 2.0)
    assert two.verdict == "undecided" and two.text.endswith("2 seeds claim no order, 3 are needed")


def test_text_says_the_numbers():
    difference = Difference(0.5, 0.25, 0.75, 3, "t 95%", 0.99, law=Law(0.5, 0.0, 0.01, 2.0))
    judged = claims.judge("c", difference, "greater", 1.25)
    assert judged.text == "+0.5 [+0.2, +0.8] points, n=3; 99.0% of draws above 0"
    slope = claims.judge("c", estimate(1.0, 2.0), "not worse", 1.0, unit="", decimals=3)
    assert slope.text == "+1.500 [+1.000, +2.000], n=3"


@pytest.mark.parametrize(
    "direction, size, message",
    [("up", 1.0, "'up'"), ("greater", 0.0, "size=0.0"), ("less", -1.0, "size=-1.0"),
     ("equal", float("nan"), "size=nan")],
)  # fmt: skip
def test_refused(direction, size, message):
    with pytest.raises(ValueError, match=message):
        claims.judge("c", None, direction, size)


def test_a_number_held_against_a_threshold_is_judged_by_what_is_above_it():
    """Its verdict and p are those of the difference, and its text has the number itself."""
    for low, high, _ in RULE:
        law = Law((low + high) / 2, 0.0, 0.25, 2.0)
        difference = replace(estimate(low, high), law=law)
        number = replace(estimate(low + 0.5, high + 0.5), law=replace(law, mean=law.mean + 0.5))
        for direction in get_args(claims.Direction):
            expected = claims.judge("c", difference, direction, 2.0)
            found = claims.judge("c", number, direction, 2.0, threshold=0.5)
            assert found.verdict == expected.verdict
            assert found.p == pytest.approx(expected.p, rel=1e-6)
    share = claims.judge("c", estimate(0.6, 0.8), "greater", 0.1, unit="", threshold=0.5)
    assert share.text == "0.7 [0.6, 0.8], n=3"
    counted = Interval(0.7, 0.7, 0.7, 1, "exact")
    assert claims.judge("c", counted, "greater", 0.1, threshold=0.5).text == "0.7 points, counted"


def test_p_values_by_hand():
    """Student's t with two degrees of freedom around 1, scale 0.5."""
    law = Law(1.0, 0.0, 0.25, 2.0)
    interval = Interval(1.0, 1 - 0.5 * 4.302653, 1 + 0.5 * 4.302653, 3, law=law)

    def p(direction):
        return claims.judge("c", interval, direction, 3.0).p

    assert p("greater") == pytest.approx(scipy_stats.t.cdf(-2, 2))
    assert p("less") == pytest.approx(scipy_stats.t.cdf(2, 2))
    assert p("not worse") == pytest.approx(scipy_stats.t.cdf(-8, 2))
    assert p("equal") == pytest.approx(scipy_stats.t.cdf(-4, 2))
    # at the end of the interval the p-value is the level of the rule
    at_end = replace(interval, law=replace(law, mean=0.5 * 4.302653))
    assert claims.judge("c", at_end, "greater", 3.0).p == pytest.approx(0.025, rel=1e-4)


def test_a_claim_is_shown_as_it_is_written():
    hostile = "<img src=x onerror=alert(1)> [here](javascript:x) `a` $x$ | *b* & N=8 < N=4"
    verdict = claims.judge(hostile, estimate(2.5, 3.0), "greater", 2.0)
    shown = text.answer([verdict]).data
    assert "<img" not in shown and " < " not in shown
    assert "\\[here\\](javascript:x)" in shown and "N=8 &lt; N=4" in shown and "\\$x\\$" in shown


def test_an_answer_lists_every_word():
    assert set(get_args(claims.VerdictWord)) == set(WORDS)
    judged = [
        claims.judge(f"claim {word}", estimate(low, high), "greater", 2.0)
        for low, high, word in RULE
    ]
    judged.append(claims.judge("claim not tested", None, "greater", 2.0))
    small, word = estimate(0.1, 1.9), "holds, below what counts"
    judged.append(claims.judge(f"claim {word}", small, "greater", 2.0, published=False))
    assert {v.verdict for v in judged} == set(WORDS)
    # a head lists few claims, so each gets a head of its own
    lines = [line for verdict in judged for line in text.answer([verdict]).data.split("\n")]
    for word in set(WORDS) - {"undecided", "not tested"}:
        said = [
            line
            for line in lines
            if line.startswith(f"- {MARKS[word]} *{word.capitalize()}:* claim {word}:")
        ]
        assert len(said) == sum(v.verdict == word for v in judged)
    assert any(line.startswith("- ? *Undecided:* claim undecided") for line in lines)


# ---------------------------------------------------------------- joint claims

HOLDS, SMALLER, BELOW, NOT, OPPOSITE, OPEN, UNTESTED = WORDS


@pytest.mark.parametrize(
    "words, joint",
    [
        ((HOLDS, HOLDS), HOLDS),
        ((HOLDS, SMALLER), SMALLER),
        ((BELOW, SMALLER), BELOW),
        ((BELOW, OPEN), OPEN),
        ((HOLDS, OPEN), OPEN),
        ((OPEN, UNTESTED), UNTESTED),
        ((HOLDS, NOT), NOT),
        ((UNTESTED, NOT), NOT),  # whatever the other part says
        ((HOLDS, OPPOSITE), NOT),
        ((OPPOSITE, OPPOSITE), OPPOSITE),
    ],
)
def test_a_joint_claim_holds_where_all_parts_do(words, joint):
    parts = [claims.Verdict(f"part {i}", word, "", 3 + i) for i, word in enumerate(words)]
    judged = claims.judge_jointly("all of it", parts)
    assert (judged.verdict, judged.n) == (joint, 3)
    assert judged.text == f"part 0 {words[0]}; part 1 {words[1]}"


def test_what_is_counted_does_not_lower_the_seeds_of_a_joint_claim():
    counted = claims.Verdict("c", HOLDS, "", 1, estimate=Interval(1.0, 1.0, 1.0, 1, "exact"))
    assert claims.judge_jointly("c", [counted, claims.Verdict("c", HOLDS, "", 8)]).n == 8
    assert claims.judge_jointly("c", [counted, counted]).n == 1


def test_a_joint_claim_is_a_pilot_where_a_part_is():
    parts = [
        claims.Verdict("c", HOLDS, "", 8, p=0.01),
        claims.Verdict("c", OPEN, "", 3, pilot=True),
    ]
    judged = claims.judge_jointly("c", parts)
    assert judged.pilot and judged.word == "undecided (pilot)" and judged.p is None
    assert not claims.judge_jointly("c", parts[:1]).pilot


# ---------------------------------------------------------------- many claims


def test_correction_by_hand():
    """Benjamini-Yekutieli of four: the k-th smallest p times 4 (1 + 1/2 + 1/3 + 1/4) / k."""
    # 25/3 times p over its rank: 0.0083 for both of the first two, 0.056 for the third
    assert corrected([0.002, 0.02, 0.9, 0.001], level=0.025) == [True, False, False, True]


def test_a_single_claim_needs_no_correction():
    assert corrected([0.02]) == [True] and corrected([0.03]) == [False]
    assert corrected([]) == []


def test_what_is_counted_has_no_chance_in_it():
    assert corrected([None, 0.02, None]) == [True, True, True]
    assert corrected([None]) == [True]
    # it takes no part: two claims with chance need 0.025 / (1 + 1/2), or half of it
    assert corrected([None, 0.017, 0.9]) == [True, False, False]
    assert corrected([0.008, None, 0.9]) == [True, True, False]


def test_correction_keeps_false_claims_rare():
    """Claims without any effect, which share an arm: without a correction one holds in every
    fourth study, with it in few."""
    rng = np.random.default_rng(0)
    some_alone, some_after = [], []
    for _ in range(300):
        z = rng.normal(size=40) + rng.normal()
        p = scipy_stats.norm.sf(z / np.sqrt(2))
        some_alone.append((p < BY_CHANCE).any())
        some_after.append(any(corrected([float(x) for x in p])))
    assert np.mean(some_alone) > 0.2
    assert np.mean(some_after) < 0.025
