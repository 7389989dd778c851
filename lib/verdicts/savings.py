"""What models made from another one save of its costs and weights, from records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .stats import Interval, finished, mean_interval, same_seed
from .values import Value, value_interval


def saved_percent(
    records: Sequence[Any], dense: Sequence[Any], cost: Callable[[Any], float]
) -> Interval | None:
    """Computes the percent of a dense model's cost that others save, and its interval over seeds.

    dense: the first finished one counts. cost: from a record to its cost. Negative where a model
    costs more. None if either side has no finished record.
    """
    base = finished(dense)[:1]
    if not base:
        return None
    return value_interval(records, lambda record: 100 * (1 - cost(record) / cost(base[0])))


def more_percent(records: Sequence[Any], others: Sequence[Any], cost: Value) -> Interval | None:
    """Computes by how many percent a cost is larger than that of the partner of the same seed, and
    its interval over seeds.

    cost: from a record to its cost, None where it was not measured; a pair that lacks one of the
    two is left out. None without a pair.
    """
    pairs = [(cost(a), cost(b)) for a, b in same_seed(records, others)]
    more = [100 * (a / b - 1) for a, b in pairs if a is not None and b is not None]
    return mean_interval(more) if more else None


def pruned_percent(records: Sequence[Any]) -> float | None:
    """Computes the percent of the prunable weights and biases that pruning removed.

    records: of one setting; the first finished one that pruned counts. It differs from the share
    that was asked for, since whole neurons and dimensions go. None where none pruned.
    """
    pruned = [record.prune for record in finished(records) if record.spec.prune is not None]
    return 100 * (1 - pruned[0]["after"] / pruned[0]["before"]) if pruned else None


def one_store_parameters(record: Any) -> float:
    """Counts the parameters of a model whose experts are sets of neurons in one store a layer.

    As copies, experts store `stored` neurons; in one store each of the `union` neurons is there
    once. A neuron has 2 D + 1 parameters: a row of the first map, its bias entry, a column of the
    second one. A layer that stayed dense has no union, and a dense model no extracted layer.
    """
    stored_twice = sum(
        (layer["stored"] - layer["union"]) * (2 * layer["width"] + 1)
        for layer in getattr(record, "extract", [])
        if "union" in layer
    )
    return record.cost["params_stored"] - stored_twice
