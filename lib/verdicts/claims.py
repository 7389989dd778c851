"""Judges published claims, by one stated rule.

| what the records say | verdict |
| --- | --- |
| no record on one of the sides | not tested |
| fewer than three seeds | undecided (one seed claims no order) |
| the 95% interval lies wholly on the claimed side of the margin | holds |
| it lies wholly on the other side | does not hold |
| it contains the margin | undecided |

For a claim of equality the claimed side is the band of plus and minus the margin: within it, holds;
apart from it, does not hold. A wide interval therefore never proves equality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .stats import MIN_SEEDS, Difference, Interval, format_interval, paired_difference, trend

__all__ = ["Verdict", "compare", "compare_trend", "judge"]

Direction = Literal["greater", "less", "equal"]


@dataclass(frozen=True)
class Verdict:
    """Says what the records make of a claim.

    claim: the published sentence. verdict: see the table above. text: the numbers behind it.
    n: number of seeds.
    """

    claim: str
    verdict: Literal["holds", "does not hold", "undecided", "not tested"]
    text: str
    n: int

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict} ({self.text})"

    def said_of(self, source: str) -> Verdict:
        """Returns the same verdict, its claim headed by the source that it was judged on."""
        return replace(self, claim=f"{source}: {self.claim}")


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
        return Verdict(claim, "undecided", f"{text}; {few}", estimate.n)
    if isinstance(estimate, Difference) and estimate.share_above is not None:
        text += f"; {100 * estimate.share_above:.1f}% of draws above 0"
    if direction == "equal":
        text += f"; band of {margin:g} {unit}"
    return Verdict(claim, _verdict_of(estimate, direction, margin), text, estimate.n)


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
