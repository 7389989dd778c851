"""The best model within a budget, on made-up records whose order is known."""

from __future__ import annotations

import pytest
from factory import record

from lib.spec import RunSpec
from lib.verdicts.budgets import candidates, method_of, winner

DENSE = RunSpec(study="bench")


def priced(top1, macs, stored=100.0, seeds=(0, 1, 2), start=DENSE, **change):
    """Records of one method, with costs in percent of the dense model's."""
    records = [record(seed, spec=start.but(init=start, **change), top1=top1) for seed in seeds]
    for made in records:
        made.cost = {"macs": 4.0 * macs, "params_stored": 2.0 * stored, "params_active": 1.0}
    return records


@pytest.fixture
def methods():
    [dense] = priced(70.0, 100.0, seeds=(0,))
    dense.spec = DENSE
    dense.id = DENSE.id
    half = priced(62.0, 50.0, stored=60.0, threads=3, train={"epochs": 1, "distil_logits": 0.5})
    child = {"start": half[0].spec, "train": {"epochs": 2, "distil_logits": 0.0}}
    return {
        "dense": [dense],
        "dense again": priced(75.0, 100.0, threads=1, train={"epochs": 1}),
        "half": half,
        "worse half": priced(40.0, 50.0, stored=50.0, threads=4, train=None),
        "child of half": priced(66.0, 70.0, **child),
        "none yet": [None, None],
    }


def test_costs_are_in_percent_of_the_dense_model(methods):
    models = {model.name: model for model in candidates(methods, {"half": 55.0})}
    assert list(models) == ["dense", "dense again", "half", "worse half", "child of half"]
    dense = {"macs": 100.0, "params_stored": 100.0, "forward": 100.0, "making": 0.0}
    assert models["dense"].costs == dense
    assert models["half"].costs == {
        "macs": 50.0,
        "params_stored": 60.0,
        "forward": 55.0,
        "making": pytest.approx(50 + 100 / 3),  # the teacher's forward pass is a third of a pass
    }
    assert models["dense again"].costs["making"] == 100.0
    assert models["worse half"].costs["making"] == 0.0  # nothing was trained
    # two passes of its own, and the run that it starts from
    assert models["child of half"].costs["making"] == pytest.approx(2 * 70 + 50 + 100 / 3)
    del methods["half"]
    [child] = [model for model in candidates(methods, {}) if model.name == "child of half"]
    assert "making" not in child.costs
    assert candidates({"half": priced(62.0, 50.0)}, {}) == []


def test_the_most_accurate_within_a_budget_wins(methods):
    models = candidates(methods, {"half": 55.0})
    small = winner(models, "macs", 60.0)
    assert (small.best.name, small.runner_up.name) == ("half", "worse half")
    assert 15 < small.ahead.low < small.ahead.mean < small.ahead.high < 30
    assert (
        small.gain.high < 0 and small.gain.n == 3
    )  # beside the dense model, outside of the budget
    assert winner(models, "macs", 80.0).best.name == "child of half"
    whole = winner(models, "macs", 100.0)
    assert whole.best.name == "dense again" and whole.gain is None
    # nothing fits, one fits, and what was not measured is left out
    assert winner(models, "macs", 40.0) is None
    assert [m.name for m in models if "forward" in m.costs] == ["dense", "half"]
    assert not any("forward" in m.costs for m in candidates(methods, {}))
    alone = winner(models, "forward", 60.0)
    assert alone.best.name == "half" and alone.runner_up is alone.ahead is None


def test_the_runner_up_is_of_another_method():
    names = ["static, 50% active", "static, 12.5% active", "dense again", "mixture, 50% pruned"]
    assert [method_of(name) for name in names] == ["static", "static", "dense", names[-1]]
    methods = {
        "dense": priced(70.0, 100.0, seeds=(0,)),
        "static, 50% active": priced(65.0, 60.0),
        "static, 30% active": priced(60.0, 40.0, threads=3),
        "MoEE, 50% active": priced(50.0, 60.0, threads=4),
    }
    models = candidates(methods, {})
    won = winner(models, "macs", 60.0)
    assert (won.best.name, won.runner_up.name) == ("static, 50% active", "MoEE, 50% active")
    assert winner(models, "macs", 40.0).runner_up is None


@pytest.mark.parametrize("best, second, seeds", [(3, 3, 3), (3, 2, 2), (1, 3, 1)])
def test_an_order_needs_three_seeds_on_both_sides(best, second, seeds):
    methods = {
        "dense": priced(70.0, 100.0, seeds=(0,)),
        "half": priced(62.0, 50.0, seeds=range(best)),
        "worse half": priced(40.0, 50.0, seeds=range(second), threads=4),
    }
    won = winner(candidates(methods, {}), "macs", 60.0)
    assert (won.best.name, won.runner_up.name) == ("half", "worse half")
    assert (won.seeds, won.ordered) == (seeds, seeds >= 3)
