"""Times candidates in turn, and makes the calls that are timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lib.measure.timing import times_of
from lib.verdicts.speed import Timing

Call = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


def timed(calls: dict[str, Call], repeats: int, warmup: int = 2, settle: int = 0) -> dict:
    """Times calls in turn (see `lib.measure.timing.times_of`); returns {name: Timing}."""
    times = times_of(calls, repeats, warmup, settle)
    return {name: summary(values) for name, values in times.items()}


def summary(times: list[float]) -> Timing:
    """Sums up times in ms: their median and their 10% quantile."""
    low = statistics.quantiles(times, n=10, method="inclusive")[0]
    return Timing(round(statistics.median(times), 4), round(low, 4))


def forward(model: Callable[[Tensor], Tensor], x: Tensor, dtype: str = "") -> Call:
    """Makes a call that runs one forward pass without gradients."""

    def run() -> None:
        with torch.inference_mode(), _cast(dtype):
            model(x)

    return run


def forward_backward(model: nn.Module, x: Tensor, dtype: str) -> Call:
    """Makes a call that runs forward and backward; input and weights get gradients.

    Gradients of weights are deleted afterwards, as in a step of a trainer.
    """

    def run() -> None:
        # Autocast is entered in each call: it remembers casts of whole weights until it is left.
        with _cast(dtype):
            y = model(x.detach().requires_grad_(True))
        y.backward(torch.ones_like(y))
        model.zero_grad(set_to_none=True)

    return run


def _cast(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
