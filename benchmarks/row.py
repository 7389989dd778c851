"""Describes a line of the benchmark: ours beside something else, and the ratio that is ideal or
asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """Holds the medians in ms of what ours is compared with and of ours.

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
        """Computes how many times ours is faster."""
        return self.against_ms / self.ours_ms

    @property
    def reached(self) -> float:
        """Computes what the target asks for: the share of the ideal ratio, or the ratio."""
        return self.ratio if self.ideal is None else self.ratio / self.ideal

    def __str__(self) -> str:
        share = mark = ""
        if self.ideal is not None:
            share = f"of {self.ideal:>5.3f}: {self.reached:>6.1%}"
        if self.target is not None:
            mark = f">={self.target:.2f} {'pass' if self.reached >= self.target else 'SHORT'}"
        text = (
            f"{self.what:<34} {self.dtype:<5} "
            f"{self.against:<17} {self.against_ms:>9.1f} ms  ours {self.ours_ms:>9.1f} ms  "
            f"ratio {self.ratio:>6.3f} {share:<18} {mark}"
        )
        return text.rstrip()


def seconds(candidates: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Times each candidate in turn and returns the medians of its wall times in s.

    It is for work of many seconds, which no warm-up changes.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, work in candidates.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def forward(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], None]:
    """Makes a call that runs one forward pass without gradients."""

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run
