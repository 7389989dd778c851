"""The explorer of models by cost and accuracy: its points, and the data that the page carries."""

from __future__ import annotations

import html
import json
import re

import paired_runs
import pytest

from lib.report import pareto


def with_cost(group, macs, stored, start=None):
    """start: the run that all of the group start from."""
    for record in group:
        record.test = {"top1": 100 * float((record.arrays["test_pred"] == 0).mean())}
        record.cost = {"macs": macs, "params_stored": stored}
        record.spec.init = start
    return group


@pytest.fixture
def records():
    dense = paired_runs.runs(paired_runs.right_of(80, 80, 80), "d")
    cut = paired_runs.runs(paired_runs.right_of(78, 78, 78), "c")
    return {
        "dense": with_cost(dense, 1000, 200),
        "cut": [*with_cost(cut, 600, 100, dense[0]), None],
        "absent": [None],
    }


def test_points_are_losses_and_shares_of_the_dense_model(records):
    [point] = pareto.points_of(records)
    assert (point.name, point.n, point.macs, point.stored) == ("cut", 3, 60.0, 50.0)
    assert point.loss == pytest.approx(2.0) and point.low <= 2.0 <= point.high
    assert pareto.points_of({"dense": [None], "cut": records["cut"]}) == []


def test_one_seed_has_no_interval(records):
    [point] = pareto.points_of({name: group[:1] for name, group in records.items()})
    assert point.n == 1 and (point.low is None) == (point.high is None)


def test_the_page_carries_the_points_as_data(records):
    points = pareto.points_of(records)
    shown = pareto.explorer(points, loss=2.0, faster=1.5).data
    data = json.loads(html.unescape(re.search(r'data-points="([^"]*)"', shown)[1]))
    assert data[0]["name"] == "cut" and data[0]["macs"] == 60.0
    assert 'data-loss="2" data-macs="66.7"' in shown and "<noscript>" in shown
    with pytest.raises(ValueError, match="no model has a record beside one of the dense model"):
        pareto.explorer([])
