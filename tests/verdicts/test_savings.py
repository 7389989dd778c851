"""What is saved of a dense model, and parameters of experts in one store."""

from types import SimpleNamespace

import pytest

from lib.verdicts.savings import (
    more_percent,
    one_store_parameters,
    pruned_percent,
    saved_percent,
)
from lib.verdicts.stats import mean_interval


def run(seed=0, macs=100.0, stored=1000, status="ok", **fields):
    cost = {"macs": macs, "params_stored": stored}
    return SimpleNamespace(
        status=status,
        spec=SimpleNamespace(seed=seed, device="cpu"),
        cost=cost,
        extract=[],
        **fields,
    )


def macs(record):
    return record.cost["macs"]


def test_percent_of_the_dense_cost():
    dense = [None, run(macs=200.0)]
    smaller = [run(0, 150.0), None, run(1, 100.0), run(2, 50.0), run(3, 1.0, status="failed")]
    assert saved_percent(smaller, dense, macs) == mean_interval([25.0, 50.0, 75.0])
    assert saved_percent([run(macs=300.0)], dense, macs).mean == -50  # it costs more


def test_nothing_is_said_without_both_sides():
    assert saved_percent([run()], [None], macs) is None
    assert saved_percent([None], [run()], macs) is None
    assert saved_percent([], [], macs) is None


def test_percent_more_than_the_partner_of_the_same_seed():
    def device(record):
        return record.memory.get("cuda")

    def measured(seed, **memory):
        return run(seed, memory=memory)

    mixtures = [measured(0, cuda=30.0), measured(1, cuda=24.0), measured(2, cuda=9.0), measured(3)]
    dense = [measured(0, cuda=20.0), measured(1, cuda=16.0), measured(2), measured(3, cuda=1.0)]
    # seeds 2 and 3 lack the number on one side
    assert more_percent(mixtures, dense, device) == mean_interval([50.0, 50.0])
    assert more_percent(mixtures[2:], dense[2:], device) is None
    assert more_percent(mixtures, [None], device) is None


def test_percent_that_pruning_removed():
    def pruned(seed, before, after, prune="by score"):
        spec = SimpleNamespace(seed=seed, device="cpu", prune=prune)
        return SimpleNamespace(status="ok", spec=spec, prune={"before": before, "after": after})

    whole = pruned(0, 0, 0, prune=None)
    assert pruned_percent([None, whole, pruned(1, 200, 50), pruned(2, 100, 99)]) == 75
    assert pruned_percent([None, whole]) is None and pruned_percent([]) is None


def test_a_neuron_of_several_experts_counts_once_in_one_store():
    record = run(stored=10_000)
    record.extract = [
        {"stored": 30, "union": 20, "width": 8},  # 10 copies of 2 * 8 + 1 parameters
        {"stored": 16, "width": 8, "dense": True},
        {"stored": 12, "union": 12, "width": 8},  # no neuron is in two experts
    ]
    assert one_store_parameters(record) == 10_000 - 10 * 17
    dense = SimpleNamespace(
        status="ok", spec=SimpleNamespace(seed=0, device="cpu"), cost=run().cost
    )
    assert one_store_parameters(dense) == 1000
    saved = saved_percent([record], [run(stored=20_000)], one_store_parameters)
    assert saved.mean == pytest.approx(100 * (1 - 9830 / 20_000))
