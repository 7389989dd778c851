"""A line of the benchmark: ours beside something else, and the ratio that would be ideal or is
asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """Medians in ms of what ours is compared with and of ours.

    ideal: the ratio of the two at the limit; None: there is none. target: least share of the ideal,
    or least ratio where there is no ideal; None: shown, not promised.
    """

    what: str
    dtype: str
    against: str
    against_ms: float
    ours_ms: float
    ideal: float | None = None
    target: float | None = None

    @property
    def ratio(self) -> float:
        """How many times ours is faster."""
        return self.against_ms / self.ours_ms

    @property
    def reached(self) -> float:
        """What the target is a number of: the share of the ideal ratio, or the ratio."""
        return self.ratio if self.ideal is None else self.ratio / self.ideal

    def __str__(self) -> str:
        share = "" if self.ideal is None else f"of {self.ideal:>5.3f}: {self.reached:>6.1%}"
        mark = (
            ""
            if self.target is None
            else f">={self.target:.2f} {'pass' if self.reached >= self.target else 'SHORT'}"
        )
        return (
            f"{self.what:<34} {self.dtype:<5} {self.against:<17} {self.against_ms:>9.1f} ms  ours "
            f"{self.ours_ms:>9.1f} ms  "
            f"ratio {self.ratio:>6.3f} {share:<18} {mark}"
        ).rstrip()


def seconds(candidates: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median wall time of each in s, run in turn: for work of many seconds, which no warm-up
    changes."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, work in candidates.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def forward(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], None]:
    """One forward pass without gradients, to be timed."""

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run
