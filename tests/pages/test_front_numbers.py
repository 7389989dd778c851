"""Numbers of the front page that no verdict has: times, what comes nearest, arms side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from paired_runs import runs

from lib import paths
from lib.pages import front_numbers
from lib.pages.parameters import UnknownRuns
from lib.paths import ROOT
from lib.runs import collect
from lib.verdicts import budgets, speed
from lib.verdicts.speed import Ratio, Timing


def measured(tmp_path, monkeypatch, ours, load=0.2, name="short"):
    """A measurement in which the whole model takes 30 ms; ours: ms by kind, batch and dtype."""
    monkeypatch.setattr(paths, "BENCH", tmp_path)
    whole = Timing(30.0, 29.0)
    rows = [
        Ratio("models", "x", shape, dtype, kind, "whole model", Timing(ms, ms), whole, 1.5)
        for (kind, shape, dtype), ms in ours.items()
    ]
    machine = {"processor": "a chip", "threads": 2, "load_average": [load, 0.0]}
    machine["capabilities"] = {"avx2": True, "amx": name == "short"}
    file = speed.file_of(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    speed.write(file, {"machine": machine}, rows)
    assert json.loads(file.read_text())["rows"]


MIXTURE, STATIC = "extracted", "static model"


def test_without_a_measurement_there_is_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BENCH", tmp_path / "none")
    assert front_numbers.clock() == ({}, "No time is measured yet (`make bench`).", "")
    assert front_numbers.at_best({}) == ""


def test_times_stand_by_dtype_then_the_machines_then_that_no_card_was_there(tmp_path, monkeypatch):
    ours = {
        (MIXTURE, "batch 1, plain", "bf16"): 40.0,
        (MIXTURE, "batch 16, plain", "bf16"): 30.0,
        (MIXTURE, "batch 16, frozen", "bf16"): 25.0,
        (STATIC, "batch 16, plain", "bf16"): 24.0,
        (MIXTURE, "batch 16, plain", "fp32"): 20.0,
        (STATIC, "batch 16, plain", "fp32"): 15.0,
    }
    measured(tmp_path, monkeypatch, ours)
    older = {(MIXTURE, "batch 16, plain", "fp32"): 24.0, (STATIC, "batch 16, plain", "fp32"): 12.0}
    measured(tmp_path, monkeypatch, older, load=3.0, name="short-old")
    fastest, limit, times = front_numbers.clock()
    assert fastest == {"the extracted mixture": 1.5, "a static pruner": 2.5}
    assert "1.50 times fewer multiply-adds; that is a count, and no upper bound" in limit
    bf16, fp32, timed, no_card = times.split(". ")
    assert bf16 == (
        "In bf16, times as fast as the whole model at best: the extracted mixture 1.20 at batch 16 "
        "and 0.75 at batch 1; a static pruner 1.25 at batch 16"
    )
    assert fp32.endswith("the extracted mixture 1.50 at batch 16; a static pruner 2.50 at batch 16")
    assert timed == (
        "Timed on a chip with AMX, 2 threads; on a chip with AVX2, without bf16 products, "
        "2 threads (uncertain: other work ran beside it)"
    )
    assert no_card == front_numbers.NO_CARD
    file = speed.file_of("short", "cuda")
    file.parent.mkdir()
    file.write_text("{}")
    assert front_numbers.NO_CARD not in front_numbers.clock()[2]


def record(accuracy, stored=1.0):
    """A record of which so many percent of 10 test images are right."""
    [made] = runs([np.arange(10) < accuracy / 10], name=f"{accuracy} ")
    made.cost = {"params_stored": stored}
    return made


def test_a_sentence_has_the_numbers_of_two_arms(monkeypatch):
    monkeypatch.setattr(front_numbers, "plan", lambda key, profile: {"one": ["a"], "two": ["b"]})
    arms = {"a": record(80.0, 3.0), "b": record(70.0, 4.0)}

    def load(grid, any_device):
        return {name: [arms[run] for run in runs] for name, runs in grid.items()}

    monkeypatch.setattr(collect, "load", load)
    text = "{first}; {second}; {gain}; {stored}"
    sentence = {"page": "a/one", "first": "one", "second": "two", "text": text}
    said = front_numbers.measured(sentence)
    assert said == "80.0, n=1; 70.0, n=1; +10.0 points, n=1; 75"
    arms["b"] = None
    assert front_numbers.measured(sentence) == ""


def test_every_sentence_of_this_book_names_arms_that_are_planned():
    front = yaml.safe_load((ROOT / "book" / "front.yaml").read_text(encoding="utf-8"))
    sentences = [
        s for part in ("questions", "wants") for q in front[part] for s in q.get("measured", [])
    ]
    assert sentences
    for sentence in sentences:
        front_numbers.measured(sentence)
    with pytest.raises(UnknownRuns, match="plans no runs called 'gone'"):
        front_numbers.measured(sentences[0] | {"first": "gone"})


def test_the_nearest_is_the_best_within_the_budget_beside_the_same_pass(monkeypatch):
    def model(name, accuracy, macs, **costs):
        return budgets.Candidate(name, (record(accuracy),), {"macs": macs} | costs)

    models = [
        model("dense again", 80.0, 100.0),
        model("half", 70.0, 66.7),
        model("less", 60.0, 50.0, forward=60.4),
    ]
    monkeypatch.setattr(front_numbers, "plan", lambda key, profile: {})
    monkeypatch.setattr(collect, "load", lambda runs, any_device: {})
    monkeypatch.setattr(budgets, "candidates", lambda records, forward: models)
    monkeypatch.setattr(budgets, "forward_times", dict)
    said = front_numbers.nearest("a/all", 80)
    assert (
        "*half*, with 67% of the multiply-adds: -10.0 points, n=1, compared with the dense" in said
    )
    assert "*less*, with 50% of the multiply-adds" in front_numbers.nearest("a/all", 60)
    assert front_numbers.nearest("a/all", 40) == ""
    # "half" has no time, so it is not known whether it is fast enough
    monkeypatch.setattr(budgets, "forward_times", lambda: {"less": 60.4})
    time = "50% of the multiply-adds and 60% of the time (batch 16, frozen, fp32)"
    assert f"*less*, with {time}" in front_numbers.nearest("a/all", 80)
    monkeypatch.setattr(budgets, "candidates", lambda records, forward: [])
    assert front_numbers.nearest("a/all", 80) == ""
