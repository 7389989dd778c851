"""Judges a claim against what was published, by one rule.

Of an interval [low, high] in the claimed direction and a size d > 0, the first line that fits:

| claim | what the records say | verdict |
| --- | --- | --- |
| any | no record on one of the sides | not tested |
| any | fewer than three seeds | undecided |
| greater, less | high < 0 | opposite |
| | low > 0 and high < d | holds, smaller than published; where none is, holds, below what counts |
| | low > 0 | holds |
| | high < d | not reproduced: the published size is excluded |
| | 0 and d both inside | undecided |
| equal | -d < low and high < d | holds |
| | d < low or high < -d | not reproduced |
| | an end of the band inside | undecided |
| not worse | -d < low | holds |
| | high < -d | not reproduced |
| | -d inside | undecided |
| joint | a part is opposite or not reproduced | not reproduced |
| | a part is not tested | not tested |
| | a part is undecided | undecided |
| | all parts hold | holds |

d is the published size, or where none is printed the smallest effect that counts; so a true null is
decided in the end. A number that is held against a threshold other than 0, such as a share against
a half, is judged by how far it is above that, and shown as it is. An end of the interval that is
equal to 0 or to d counts as inside. "equal" asks for the band from -d to d; "not worse" has its
lower end alone, so that a gain never fails it. Neither claims a direction, so nothing is their
opposite. A joint claim all of whose parts are opposite is opposite itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .stats import MIN_SEEDS, Difference, Interval, format_interval

if TYPE_CHECKING:
    from .ledger import Claim

__all__ = ["Verdict", "amount", "judge", "judge_jointly"]

Direction = Literal["greater", "less", "equal", "not worse"]
VerdictWord = Literal[
    "holds",
    "holds, smaller than published",
    "holds, below what counts",
    "not reproduced",
    "opposite",
    "undecided",
    "not tested",
]


@dataclass(frozen=True)
class Verdict:
    """Says what the records make of a claim.

    claim: the sentence. verdict: see the table above. text: the numbers behind it. n: number of
    seeds. size: published, or half of the band of an equality; None of a joint claim. p: the chance
    of the records, or of ones that say it more clearly, where the claim is false, one-sided; None
    without interval. From the law of the estimate (`law.Law`) and not from its draws, whose
    smallest share is too large for a correction over many claims. So p is below 2.5% where the 95%
    interval says "holds", but for the random error of ends that are drawn. entry: in the ledger.
    records: ids of those behind it. pilot: whether further seeds are planned. parts: of a joint
    claim, the verdicts that it follows from.
    """

    claim: str
    verdict: VerdictWord
    text: str
    n: int
    size: float | None = None
    p: float | None = None
    entry: Claim | None = None
    estimate: Interval | None = None
    records: tuple[str, ...] = ()
    pilot: bool = False
    parts: tuple[Verdict, ...] = ()

    def __str__(self) -> str:
        return f"{self.claim}: {self.word} ({self.text})"

    @property
    def id(self) -> str:
        """Returns the id of the claim in the ledger; "" for one that is not in it."""
        return self.entry.id if self.entry else ""

    @property
    def word(self) -> str:
        """Returns the verdict, with the mark of a pilot."""
        return f"{self.verdict} (pilot)" if self.pilot else self.verdict

    @property
    def holds(self) -> bool:
        """Says whether the claim holds, at its published size or a smaller one."""
        return self.verdict.startswith("holds")

    @property
    def decisive(self) -> Verdict | None:
        """Returns the part that decides a joint claim: of those from which its verdict follows, the
        one that speaks least for it; None without a number, or for a claim without parts."""
        fails = ("opposite", "not reproduced")
        words = fails if self.verdict in fails else (self.verdict,)
        deciding = [p for p in self.parts if p.verdict in words and p.estimate is not None]
        return max(deciding, key=lambda part: -1 if part.p is None else part.p, default=None)


def judge(
    claim: str,
    estimate: Interval | None,
    direction: Direction,
    size: float,
    unit: str = "points",
    decimals: int = 1,
    published: bool = True,
    threshold: float = 0.0,
) -> Verdict:
    """Judges an estimate against what was published, by the table above.

    estimate: a difference or a slope, in `unit`; None = no records. direction: "not worse" is for
    estimates of which more is better. size: the published size, above 0 also for "less"; half of
    the band for "equal" and "not worse". published: False where the size is not a document's but
    the smallest effect that counts. threshold: what the estimate is held against, in `unit`.
    Raises ValueError for another direction or size.
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
        return Verdict(claim, "not tested", "no records", 0, size)
    text = _numbers(estimate, unit, decimals, signed=threshold == 0)
    if estimate.low is None:
        return Verdict(claim, "undecided", text, estimate.n, size, estimate=estimate)
    verdict = _verdict_of(estimate, direction, size, threshold)
    p = _p_of(estimate, direction, size, threshold)
    if verdict == "holds, smaller than published" and not published:
        verdict = "holds, below what counts"
    return Verdict(claim, verdict, text, estimate.n, size, p, estimate=estimate)


def judge_jointly(claim: str, parts: Sequence[Verdict]) -> Verdict:
    """Judges a claim that states several things at once by the verdicts on its parts.

    It has no p-value of its own: what is corrected for their number is the parts.
    """
    words = [part.verdict for part in parts]
    text = "; ".join(f"{part.id or part.claim} {part.word}" for part in parts)
    # what is counted has no seeds that a joint claim could be short of
    measured = [part for part in parts if part.estimate is None or part.estimate.method != "exact"]
    n = min(part.n for part in measured or parts)
    records = tuple(dict.fromkeys(run for part in parts for run in part.records))
    pilot = any(part.pilot for part in parts)
    word, parts = _joint_word(words), tuple(parts)
    return Verdict(claim, word, text, n, records=records, pilot=pilot, parts=parts)


def amount(size: float, unit: str) -> str:
    """Writes a size with its unit: 1 point, 2.5 points."""
    return f"{size:g} {unit.removesuffix('s') if size == 1 else unit}".rstrip()


def _joint_word(words: Sequence[VerdictWord]) -> VerdictWord:
    if all(word == "opposite" for word in words):
        return "opposite"
    if {"opposite", "not reproduced"} & set(words):
        return "not reproduced"
    weakest = ("not tested", "undecided", "holds, below what counts")
    for word in (*weakest, "holds, smaller than published"):
        if word in words:
            return word
    return "holds"


def _numbers(estimate: Interval, unit: str, decimals: int, signed: bool) -> str:
    """Writes an estimate for a verdict, and why it has no interval if it has none."""
    if estimate.method == "exact":
        sign = "+" if signed else ""
        return f"{estimate.mean:{sign}.{decimals}f} {unit}".rstrip() + ", counted"
    text = format_interval(estimate, decimals, signed=signed, unit=unit)
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


def _verdict_of(
    estimate: Interval, direction: Direction, size: float, threshold: float
) -> VerdictWord:
    """Compares an interval, which must be there, with a published size or a band."""
    low, high = estimate.low - threshold, estimate.high - threshold
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


def _p_of(estimate: Interval, direction: Direction, size: float, threshold: float) -> float | None:
    """Computes the one-sided p-value of a claim; of the two sides of a band the larger one."""
    law = estimate.law
    if law is None:
        return None
    if direction == "greater":
        return law.below(threshold)
    if direction == "less":
        return law.above(threshold)
    worse = law.below(threshold - size)
    return worse if direction == "not worse" else max(worse, law.above(threshold + size))
