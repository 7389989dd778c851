"""Times how the layer's time grows with experts and tokens, and a model's with its MoE layers.

A ratio of 1 is growth with the multiply-adds: none with E, in proportion with T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

import lib
from lib.verdicts.speed import Ratio

from . import machine
from .clock import DTYPES, forward, timed
from .layers import FROZEN, PLAIN, Setting, inputs, moe_layer

BATCHES, EXPERTS = (1, 4, 16, 64), (4, 8, 16, 64)
SHORT_BATCHES, SHORT_EXPERTS = (1, 4, 16), (4, 8, 16)


def rows(repeats: int, full: bool) -> Iterator[Ratio]:
    """Measures growth with E, then with T, in fp32 and bf16."""
    start = Setting(16, 257, 8, 1)
    batches, experts = (BATCHES, EXPERTS) if full else (SHORT_BATCHES, SHORT_EXPERTS)
    for dtype in ("fp32", "bf16"):
        if machine.why_not(dtype, packed=False):
            continue  # the rows of the layer say why
        yield from _grown(
            "growth with E", [replace(start, experts=count) for count in experts], dtype, repeats
        )
        yield from _grown(
            "growth with T", [replace(start, batch=batch) for batch in batches], dtype, repeats
        )


def _grown(what: str, settings: list[Setting], dtype: str, repeats: int) -> Iterator[Ratio]:
    """Measures layers in turn; each row stands against the first, scaled by the tokens."""
    freezes = not machine.why_not(dtype, packed=True)
    calls = {}
    for setting in settings:
        layer = nn.Sequential(moe_layer(setting)).to(DTYPES[dtype]).eval()
        layer = lib.freeze_for_inference(layer) if freezes else layer
        calls[str(setting)] = forward(layer, inputs(setting).to(DTYPES[dtype]))
    times = timed(calls, repeats)
    first = settings[0]
    for setting in settings[1:]:
        yield Ratio(
            part="growth",
            what=what,
            shape=str(setting),
            dtype=dtype,
            ours_is=FROZEN if freezes else PLAIN,
            against=f"E={first.experts}" if what.endswith("E") else f"B={first.batch}",
            ours=times[str(setting)],
            other=times[str(first)],
            ideal=first.batch / setting.batch,
        )
