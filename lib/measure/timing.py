"""Memory and time, measured: the resident set of this process, and candidates timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def peak_rss_mib(reset: bool = False) -> float:
    """Reads the largest resident set of this process, in MiB, since the last reset where the OS
    permits one (Linux).

    reset=True starts a new measurement after reading; where that is not permitted the peak goes on
    from process start.
    """
    try:
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
        if reset:
            try:
                with open("/proc/self/clear_refs", "w") as refs:
                    refs.write("5")  # 5 = set the high-water mark to the present size
            except OSError:
                pass
        return peak
    except (OSError, StopIteration):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


@dataclass(frozen=True)
class Latency:
    """Wall time of one call in ms: median and 10 % quantile over `repeats` calls."""

    median: float
    q10: float
    repeats: int


def compare(
    candidates: dict[str, Callable[[], object]], repeats: int = 20, warmup: int = 3, settle: int = 0
) -> dict[str, Latency]:
    """Times several functions as `times_of` does, and sums each up.

    repeats: at least 20, so that the quantile means something. Raises ValueError for fewer.
    """
    check_repeats(repeats)
    times = times_of(candidates, repeats, warmup, settle)
    return {name: _summary(values) for name, values in times.items()}


def times_of(
    candidates: dict[str, Callable[[], object]], repeats: int, warmup: int = 3, settle: int = 0
) -> dict[str, list[float]]:
    """Times several functions in turn (a b c a b c ...), so that a drift of the machine meets all
    of them alike; returns `repeats` times of each, in ms.

    repeats: timed calls of each, after `warmup` untimed turns. settle: untimed calls before each
    timed one. In service a model follows itself, and finds its weights in the cache as far as they
    fit there; without settling it follows its rival.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, fn in candidates.items():
            for _ in range(settle):
                fn()
            _synchronize()
            start = time.perf_counter()
            fn()
            _synchronize()
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def check_repeats(repeats: int) -> None:
    """Raises ValueError for fewer than 20 timed calls."""
    if repeats < 20:
        raise ValueError(f"repeats={repeats} is too few for a median with quantiles: at least 20")


def _summary(values: list[float]) -> Latency:
    q10 = statistics.quantiles(values, n=10, method="inclusive")[0]
    return Latency(statistics.median(values), q10, len(values))


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
