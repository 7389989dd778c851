"""The explorer of models by cost and accuracy: its points, and the data that the page carries."""

from __future__ import annotations

import html
import json
import re
from types import SimpleNamespace

import paired_runs
import pytest

from lib.report import pareto
from lib.verdicts.evidence import judge_retained


def with_cost(group, macs, stored, start=None):
    """start: the run that all of the group start from."""
    for record in group:
        record.test = {"top1": 100 * float((record.arrays["test_pred"] == 0).mean())}
        record.cost = {"macs": macs, "params_stored": stored}
        record.spec.init, record.spec.extract = start, None
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


def test_the_interval_is_that_of_the_verdict_and_knows_the_test_images(records):
    [point] = pareto.points_of(records)
    # three seeds that agree would have no interval over seeds alone
    assert point.low < 2.0 < point.high
    judged = judge_retained("M.refit50", records["cut"], records["dense"]).estimate(None)
    ends = (judged.mean, judged.high, judged.low)
    in_percent = [-100 * loss / 80 for loss in (point.loss, point.low, point.high)]
    assert in_percent == pytest.approx(ends) and point.n == judged.n == 3


def test_a_model_that_starts_from_another_one_has_no_point(records):
    other = with_cost(paired_runs.runs(paired_runs.right_of(90), "o"), 1000, 200)[0]
    records["cut"] = with_cost(records["cut"][:3], 600, 100, other)
    assert pareto.points_of(records) == []


def timed_as(run, **change):
    """A run of the page of all methods, of the same model but for a change."""
    return SimpleNamespace(**{"init": run.spec.init, "extract": run.spec.extract} | change)


def test_a_model_extracted_alike_from_the_same_dense_one_has_its_time(records, monkeypatch):
    percent = {"static 50% active": 70.0, "not in the grid": 50.0}
    monkeypatch.setattr(pareto, "forward_times", lambda: percent)
    cut = records["cut"][0]
    for record in records["cut"][:3]:
        record.spec.extract = "half of the neurons"
    alike = timed_as(cut)
    others = (
        timed_as(cut, extract="a third of them"),
        timed_as(cut, init=records["dense"][1]),
        timed_as(cut, init=None),
    )
    for run, time in [(alike, 70.0), *((other, None) for other in others)]:
        [point] = pareto.points_of(records, {"static 50% active": [run]})
        assert point.time == time
    [point] = pareto.points_of(records, {"without a time": [alike]})
    assert point.time is None
    for record in records["cut"][:3]:  # rules are what a time goes by
        record.spec.extract = None
    [point] = pareto.points_of(records, {"static 50% active": [timed_as(cut, extract=None)]})
    assert point.time is None


def test_numbers_are_carried_to_the_digit_that_is_printed():
    point = pareto.Point("cut", 2.04, None, -0.04, 1, 66.68, 50.0)
    shown = pareto.explorer([point], "photos").data
    [data] = json.loads(html.unescape(re.search(r'data-points="([^"]*)"', shown)[1]))
    assert (data["loss"], data["low"], str(data["high"])) == (2.0, None, "0.0")
    assert (data["macs"], data["n"]) == (66.7, 1)


def test_the_page_carries_the_points_as_data(records):
    points = pareto.points_of(records)
    shown = pareto.explorer(points, "photos & maps", loss=2.0, faster=1.5).data
    data = json.loads(html.unescape(re.search(r'data-points="([^"]*)"', shown)[1]))
    assert data[0]["name"] == "cut" and data[0]["macs"] == 60.0
    assert 'data-images="photos &amp; maps" data-timed="batch 16, frozen, fp32" ' in shown
    assert 'data-loss="2" data-cost="66.7"' in shown
    assert "<noscript>" in shown
    with pytest.raises(ValueError, match="no model has a record beside one of the dense model"):
        pareto.explorer([], "photos")
