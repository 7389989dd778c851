"""Mixture-of-experts layers for vision transformers, and the runs that a book about them needs.

`import lib` is fast and silent: nothing heavy is imported before it is asked for, so that planning
a build, which reads notebooks and compares hashes, never waits for torch. It offers:

- to a notebook: `profile` (parameters), `page` (what all pages have in common), `collect` (records,
  computing what is missing), `load` (records, never computing), `plan` (the runs of another
  notebook), `model_of` (the model that a run left), `RunSpec`;
- to a model of one's own: `upcycle`, `prune`, `extract`, `drop_experts` and `finetune`, which take
  a module and a loader and give a module; `compare` and `advice` (accuracy, size and time side by
  side); `save`, `restore`, `for_export` and `freeze_for_inference`; `MoESpec`, `RoutingTape` and
  the losses.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module that it is imported from on first use
_HOME = {
    "MoESpec": "lib.spec",
    "RoutingTape": "lib.models.moe",
    "RunSpec": "lib.spec",
    "advice": "lib.api.compare",
    "auxiliary_loss": "lib.api.finetune",
    "collect": "lib.runs.collect",
    "compare": "lib.api.compare",
    "drop_experts": "lib.api.drop",
    "extract": "lib.api.extract",
    "finetune": "lib.api.finetune",
    "for_export": "lib.api.export",
    "freeze_for_inference": "lib.api.freeze",
    "load": "lib.runs.collect",
    "model_of": "lib.runs.collect",
    "on_device": "lib.api.loaders",
    "page": "lib.pages.page",
    "plan": "lib.pages.profiles",
    "profile": "lib.pages.profiles",
    "prune": "lib.api.prune",
    "restore": "lib.api.save",
    "save": "lib.api.save",
    "switch_loss": "lib.models.balance",
    "upcycle": "lib.api.upcycle",
    "z_loss": "lib.models.balance",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(sorted(_HOME))}"
        )
    # `__name__` is "moe_vision" where the package is imported under that name
    return getattr(import_module(__name__ + _HOME[name].removeprefix("lib")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
