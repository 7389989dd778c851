"""Says which of several models that were made from one dense model is best within a budget.

A budget is a limit on one cost: multiply-adds of an image, stored parameters or the time of a
forward pass, in percent of the dense model's, or the multiply-adds of the training that made the
model, in percent of those of one pass of the dense model over its training images. Accuracies are
test top-1 in percent, differences in points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..runs.estimate import BACKWARD
from . import speed
from .stats import (
    MIN_SEEDS,
    Difference,
    Interval,
    accuracy_interval,
    finished,
    paired_difference,
)

# cost -> what it is called, with its unit
COSTS = {
    "macs": "multiply-adds (% of dense)",
    "params_stored": "stored parameters (% of dense)",
    "forward": "time of a forward pass (% of dense)",
    "making": "training (% of one pass of dense)",
}
TIMED = "batch 16, frozen", "fp32"  # shape and dtype of the forward pass whose time is a cost


def forward_times() -> dict[str, float]:
    """Reads the times of that forward pass of the models of `beyond/frontier`, by name, in percent
    of the dense model's; empty where none was measured."""
    return speed.percent_of_dense(speed.file_of("frontier"), *TIMED)


@dataclass(frozen=True)
class Candidate:
    """Holds a model: its name, its finished records, one a seed, and its costs (see COSTS).

    A cost that was not measured is absent.
    """

    name: str
    records: tuple[Any, ...]
    costs: Mapping[str, float]

    @cached_property
    def accuracy(self) -> Interval:
        """Computes the mean over the seeds, with its interval where there are enough."""
        return accuracy_interval(self.records)


def candidates(
    records: Mapping[str, Sequence[Any]], forward: Mapping[str, float]
) -> list[Candidate]:
    """Makes a candidate of each name that has a finished record; none without one of "dense".

    records: by name, one a seed. forward: times of a forward pass by name, in percent of that of
    the dense model, which needs no entry; empty where none was measured. Sizes and training are
    those of the first record.
    """
    done = {name: tuple(finished(group)) for name, group in records.items()}
    if not done.get("dense"):
        return []
    whole = done["dense"][0]
    by_id = {record.id: record for group in done.values() for record in group}
    models = []
    for name, group in done.items():
        if not group:
            continue
        first = group[0]
        costs = {
            size: 100 * first.cost[size] / whole.cost[size] for size in ("macs", "params_stored")
        }
        if name in forward or (forward and name == "dense"):
            costs["forward"] = forward.get(name, 100.0)
        making = _making(whole, first, by_id)
        if making is not None:
            costs["making"] = making
        models.append(Candidate(name, group, costs))
    return models


def _making(whole: Any, record: Any, by_id: Mapping[str, Any]) -> float | None:
    """Adds up the training of the runs that lead from the dense model to a record, in percent of
    one pass of the dense model; None where one of them has no record.

    An image counts a forward pass of the trained model, BACKWARD more, and a forward pass of the
    teacher, if there is one. The clock would count other work of its machine, too.
    """
    macs = 0.0
    while record.id != whole.id:
        train, start = record.spec.train, record.spec.init
        if start is None or start.id not in by_id:
            return None
        parent = by_id[start.id]
        if train is not None:
            of_image = (1 + BACKWARD) * record.cost["macs"]
            of_image += parent.cost["macs"] * train.has_teacher
            macs += train.epochs * of_image
        record = parent
    return 100 * macs / ((1 + BACKWARD) * whole.cost["macs"])


@dataclass(frozen=True)
class Winner:
    """Holds the model of the highest mean within a budget.

    runner_up: the next of another method within it, None without one; ahead: how much better the
    best is than it. gain: how much better the best is than the reference, which may lie outside of
    the budget.
    """

    best: Candidate
    runner_up: Candidate | None
    ahead: Difference | None
    gain: Difference | None

    @property
    def seeds(self) -> int:
        """Counts the seeds of the best and the runner-up, the smaller number."""
        models = filter(None, (self.best, self.runner_up))
        return min(model.accuracy.n for model in models)

    @property
    def ordered(self) -> bool:
        """Says whether there are seeds enough to claim that the best is one."""
        return self.seeds >= MIN_SEEDS


def method_of(name: str) -> str:
    """Returns the method of a model: its name without the size, or without the further pass."""
    return re.sub(r"(, [0-9.]+% active| again)$", "", name)


def winner(
    models: Sequence[Candidate], cost: str, limit: float, reference: str = "dense again"
) -> Winner | None:
    """Finds the model of the highest mean whose cost is at most `limit`.

    The runner-up is of another method: the same one at another size is no rival. A model whose cost
    is not known is left out; of equals the first is taken. reference: name of the model that the
    best is compared with. None where no model fits.
    """
    within = [model for model in models if model.costs.get(cost, float("inf")) <= limit]
    within.sort(key=lambda model: -model.accuracy.mean)
    if not within:
        return None
    best = within[0]
    rivals = (model for model in within if method_of(model.name) != method_of(best.name))
    runner_up = next(rivals, None)
    beside = next((model.records for model in models if model.name == reference), ())
    return Winner(
        best,
        runner_up,
        paired_difference(best.records, runner_up.records) if runner_up else None,
        None if best.name == reference else paired_difference(best.records, beside),
    )
