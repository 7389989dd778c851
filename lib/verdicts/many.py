"""Corrects the claims of a study for their number.

Each claim that is false holds by its own interval with a chance of 2.5%, so of 150 false ones
nearly four would. Benjamini and Yekutieli (2001, "The control of the false discovery rate in
multiple testing under dependency") bound the expected share of false ones among those that hold;
theirs is the form that asks nothing of how the claims depend on each other, and claims that share
an arm do.
"""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import false_discovery_control

from .stats import LEVEL

__all__ = ["BY_CHANCE", "corrected"]

# of the interval, on the side where a claim could fail: the chance of a false claim to hold
BY_CHANCE = (1 - LEVEL) / 2


def corrected(p_values: Sequence[float | None], level: float = BY_CHANCE) -> list[bool]:
    """Says which claims of a study hold after the correction of Benjamini and Yekutieli.

    p_values: of all claims of the study, also of those that fail or are open: leaving them out
    would hide how many were tried. None of a claim that is counted and has no chance in it; it
    takes no part and passes. level: bound on the expected share of false claims among those that
    hold; by default a single claim holds after the correction just where it holds alone.
    """
    with_chance = [p for p in p_values if p is not None]
    adjusted = iter(false_discovery_control(with_chance, method="by") if with_chance else ())
    return [p is None or bool(next(adjusted) <= level) for p in p_values]
