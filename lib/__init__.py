"""Mixture-of-experts layers for vision transformers, and the runs that a book about them is made
of.

`import lib` is fast and silent: nothing heavy is imported before it is asked for, so that planning
a build, which reads notebooks and compares hashes, never waits for torch. What a notebook and a
guest need is offered here: `profile` (parameters), `collect` (records, computing what is missing),
`load` (records, never computing), `page` (what every page of
the book has in common), `model_of` (the model that a run left), `plan` (the runs of another
notebook), and for a model of one's own `upcycle`, `MoESpec`, `RoutingTape` and the losses.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "profile": "lib.pages.profiles",
    "plan": "lib.pages.profiles",
    "page": "lib.pages.page",
    "collect": "lib.runs.collect",
    "load": "lib.runs.collect",
    "model_of": "lib.runs.collect",
    "RunSpec": "lib.spec",
    "MoESpec": "lib.spec",
    "upcycle": "lib.models.upcycle",
    "RoutingTape": "lib.models.moe",
    "switch_loss": "lib.models.balance",
    "z_loss": "lib.models.balance",
}

# Names are resolved on first use, below.
__all__ = [
    "MoESpec",
    "RoutingTape",
    "RunSpec",
    "collect",
    "load",
    "model_of",
    "page",
    "plan",
    "profile",
    "switch_loss",  # noqa: F822
    "upcycle",
    "z_loss",
]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'lib' has no attribute {name!r}; it offers {', '.join(sorted(_HOME))}"
        )
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
