"""Judges published claims, by a stated rule.

`judge` compares with a margin:

| what the records say | verdict |
| --- | --- |
| no record on one of the sides | not tested |
| fewer than three seeds | undecided (one seed claims no order) |
| the 95% interval lies wholly on the claimed side of the margin | holds |
| it lies wholly on the other side | does not hold |
| it contains the margin | undecided |

For a claim of equality the claimed side is the band of plus and minus the margin: within it, holds;
apart from it, does not hold. A wide interval therefore never proves equality.

`judge_against` compares with what was published, so that a true null is decided in the end. Of an
interval [low, high] in the claimed direction and a published size d > 0, the first line that fits:

| claim | what the records say | verdict |
| --- | --- | --- |
| any | no record on one of the sides | not tested |
| any | fewer than three seeds | undecided |
| greater, less | high < 0 | opposite |
| | low > 0 and high < d | holds, smaller than published |
| | low > 0 | holds |
| | high < d | not reproduced: the published size is excluded |
| | 0 and d both inside | undecided |
| equal | -d < low and high < d | holds |
| | d < low or high < -d | not reproduced |
| | an end of the band inside | undecided |
| not worse | -d < low | holds |
| | high < -d | not reproduced |
| | -d inside | undecided |

An end of the interval that is equal to 0 or to d counts as inside. "equal" asks for the band from
-d to d; "not worse" has its lower end alone, so that a gain never fails it. Neither claims a
direction, so nothing is their opposite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .stats import MIN_SEEDS, Difference, Interval, format_interval, paired_difference, trend

if TYPE_CHECKING:
    from .moderated import SeedPrior

__all__ = [
    "SizedVerdict",
    "Verdict",
    "compare",
    "compare_against",
    "compare_trend",
    "judge",
    "judge_against",
]

Direction = Literal["greater", "less", "equal"]
PublishedDirection = Literal["greater", "less", "equal", "not worse"]
VerdictWord = Literal[
    "holds",
    "holds, smaller than published",
    "not reproduced",
    "opposite",
    "does not hold",
    "undecided",
    "not tested",
]


@dataclass(frozen=True)
class Verdict:
    """Says what the records make of a claim.

    claim: the published sentence. verdict: see the tables above. text: the numbers behind it.
    n: number of seeds.
    """

    claim: str
    verdict: VerdictWord
    text: str
    n: int

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict} ({self.text})"

    def said_of(self, source: str) -> Verdict:
        """Returns the same verdict, its claim headed by the source that it was judged on."""
        return replace(self, claim=f"{source}: {self.claim}")


@dataclass(frozen=True)
class SizedVerdict(Verdict):
    """Says what the records make of a claim of a published size.

    size: published, or half of the band of an equality. p: the chance of the records, or of ones
    that say it more clearly, where the claim is false, one-sided; None without interval. From the
    law of the estimate (`law.Law`) and not from its draws, whose smallest share is too large for a
    correction over many claims. So p is below 2.5% where the 95% interval says "holds", but for the
    random error of its ends.
    """

    size: float = 0.0
    p: float | None = None


def judge(
    claim: str,
    estimate: Interval | None,
    direction: Direction,
    margin: float = 0.0,
    unit: str = "points",
    decimals: int = 1,
) -> Verdict:
    """Judges an estimate by the rule above.

    estimate: a difference or a slope, in `unit`; None = no records. direction: "greater" and "less"
    compare with +margin and -margin; "equal" asks for the band between and needs margin > 0.
    Raises ValueError for another direction or margin.
    """
    if direction not in ("greater", "less", "equal"):
        raise ValueError(f"direction={direction!r} is unknown: use 'greater', 'less' or 'equal'")
    if margin < 0 or (direction == "equal" and margin == 0):
        raise ValueError(
            f"margin={margin} with direction={direction!r}: give a margin above 0 for 'equal' "
            "(no finite sample shows exact equality) and 0 or more otherwise"
        )
    if estimate is None:
        return Verdict(claim, "not tested", "no records", 0)
    text = _numbers(estimate, unit, decimals)
    if estimate.low is None:
        return Verdict(claim, "undecided", text, estimate.n)
    if direction == "equal":
        text += f"; band of {margin:g} {unit}"
    return Verdict(claim, _verdict_of(estimate, direction, margin), text, estimate.n)


def _numbers(estimate: Interval, unit: str, decimals: int) -> str:
    """Writes an estimate for a verdict, and why it has no interval if it has none."""
    text = format_interval(estimate, decimals, signed=True)
    if unit:  # +1.2 [0.3, 2.1] points, n=3
        value, _, seeds = text.rpartition(", n=")
        text = f"{value} {unit}, n={seeds}"
    if estimate.low is None:
        few = (
            "one seed claims no order"
            if estimate.n == 1
            else f"{estimate.n} seeds claim no order, {MIN_SEEDS} are needed"
        )
        return f"{text}; {few}"
    if isinstance(estimate, Difference) and estimate.share_above is not None:
        text += f"; {100 * estimate.share_above:.1f}% of draws above 0"
    return text


def _verdict_of(estimate: Interval, direction: Direction, margin: float) -> str:
    """Compares an interval, which must be there, with the claimed side of the margin."""
    low, high = estimate.low, estimate.high
    if direction == "greater":
        holds, fails = low > margin, high < margin
    elif direction == "less":
        holds, fails = high < -margin, low > -margin
    else:
        holds, fails = -margin < low and high < margin, low > margin or high < -margin
    if holds:
        return "holds"
    return "does not hold" if fails else "undecided"


def judge_against(
    claim: str,
    estimate: Interval | None,
    direction: PublishedDirection,
    size: float,
    unit: str = "points",
    decimals: int = 1,
) -> SizedVerdict:
    """Judges an estimate against what was published, by the second table above.

    estimate: a difference or a slope, in `unit`; None = no records. direction: "not worse" is for
    estimates of which more is better. size: the published size, above 0 also for "less"; half of
    the band for "equal" and "not worse". Raises ValueError for another direction or size.
    """
    if direction not in ("greater", "less", "equal", "not worse"):
        raise ValueError(
            f"direction={direction!r} is unknown: use 'greater', 'less', 'equal' or 'not worse'"
        )
    if not size > 0:
        raise ValueError(
            f"size={size} with direction={direction!r}: give the published size as a number above "
            "0; where a document prints none, the smallest effect that counts"
        )
    if estimate is None:
        return SizedVerdict(claim, "not tested", "no records", 0, size)
    text = _numbers(estimate, unit, decimals)
    if estimate.low is None:
        return SizedVerdict(claim, "undecided", text, estimate.n, size)
    banded = direction in ("equal", "not worse")
    text += f"; {'band of' if banded else 'published'} {size:g} {unit}".rstrip()
    verdict = _verdict_against(estimate, direction, size)
    return SizedVerdict(claim, verdict, text, estimate.n, size, _p_of(estimate, direction, size))


def _verdict_against(estimate: Interval, direction: PublishedDirection, size: float) -> VerdictWord:
    """Compares an interval, which must be there, with a published size or a band."""
    low, high = estimate.low, estimate.high
    if direction == "equal":
        holds, excluded = -size < low and high < size, low > size or high < -size
    elif direction == "not worse":
        holds, excluded = -size < low, high < -size
    else:
        if direction == "less":
            low, high = -high, -low
        if high < 0:
            return "opposite"
        holds, excluded = low > 0, high < size
        if holds and excluded:
            return "holds, smaller than published"
    if holds:
        return "holds"
    return "not reproduced" if excluded else "undecided"


def _p_of(estimate: Interval, direction: PublishedDirection, size: float) -> float | None:
    """Computes the one-sided p-value of a claim; of the two sides of a band the larger one."""
    law = estimate.law
    if law is None:
        return None
    if direction == "greater":
        return law.below(0.0)
    if direction == "less":
        return law.above(0.0)
    worse = law.below(-size)
    return worse if direction == "not worse" else max(worse, law.above(size))


def compare_against(
    claim: str,
    records_a: Sequence[Any],
    records_b: Sequence[Any],
    direction: PublishedDirection,
    size: float,
    prior: SeedPrior | None = None,
) -> SizedVerdict:
    """Judges test top-1 of a against b, paired by seed, against a published size in points.

    prior: what the study says of the variance between seeds (`moderated.study_prior`).
    """
    difference = paired_difference(records_a, records_b, prior=prior)
    return judge_against(claim, difference, direction, size)


def compare(
    claim: str,
    records_a: Sequence[Any],
    records_b: Sequence[Any],
    direction: Direction,
    margin: float = 0.0,
) -> Verdict:
    """Judges test top-1 of a against b, one record per seed on each side, in points."""
    return judge(claim, paired_difference(records_a, records_b), direction, margin)


def compare_trend(
    claim: str,
    x: Sequence[float],
    rows: Sequence[Sequence[float]],
    direction: Direction,
    margin: float = 0.0,
    unit: str = "per block",
    decimals: int = 3,
) -> Verdict:
    """Judges the slope of y over x.

    x: (J,) positions, such as block numbers; rows: (S, J) values of y, such as information by
    depth, one row per seed. Without rows the claim is not tested.
    """
    return judge(claim, trend(x, rows) if len(rows) else None, direction, margin, unit, decimals)
