"""Corrects the claims of a study for their number.

Each claim that is false holds by its own interval with a chance of 2.5%, so of 150 false ones
nearly four would. Benjamini and Yekutieli (2001, "The control of the false discovery rate in
multiple testing under dependency") bound the expected share of false ones among those that hold;
theirs is the form that asks nothing of how the claims depend on each other, and claims that share
an arm do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import false_discovery_control

from .claims import SizedVerdict
from .stats import LEVEL

__all__ = ["Correction", "correct"]

ONE_SIDED = (1 - LEVEL) / 2  # of the interval, on the side where a claim could fail


@dataclass(frozen=True)
class Correction:
    """Says which claims of a study hold after the correction.

    after: of each claim, in order, whether it holds alone and after the correction. tested: claims
    with a p-value. hold_alone, hold_after: how many hold. expected_by_chance: how many would hold
    alone, on average and at most, if all tested claims were false. expected_false: how many of
    those that hold after the correction are false, on average and at most.
    """

    after: tuple[bool, ...]
    tested: int
    hold_alone: int
    hold_after: int
    expected_by_chance: float
    expected_false: float


def correct(judged: Sequence[SizedVerdict], level: float = ONE_SIDED) -> Correction:
    """Corrects the verdicts of a study by Benjamini and Yekutieli.

    judged: all claims of the study, also those that fail or are open: leaving them out would hide
    how many were tried. level: bound on the expected share of false claims among those that hold;
    by default a single claim holds after the correction just where it holds alone.
    """
    p_values = [v.p for v in judged if v.p is not None]
    adjusted = iter(false_discovery_control(p_values, method="by") if p_values else ())
    holds = [v.verdict.startswith("holds") for v in judged]
    small = [v.p is not None and next(adjusted) <= level for v in judged]
    after = tuple(alone and corrected for alone, corrected in zip(holds, small, strict=True))
    return Correction(
        after, len(p_values), sum(holds), sum(after), level * len(p_values), level * sum(after)
    )
