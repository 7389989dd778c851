"""The rules and the layers of an extraction as cells of a table."""

from types import SimpleNamespace

import numpy as np
import pytest
from paired_runs import right_of, runs

from lib.report.extracted import (
    active_by_block,
    active_share,
    by_active_share,
    called,
    extraction_row,
    goal_of,
    moves,
    rows_by_block,
    rules_row,
)
from lib.spec import ClusterSpec, ExtractSpec


def test_the_reading_as_printed_is_named_beside_others():
    assert called("p = 80, finetuned") == "as printed, p = 80, finetuned"
    assert called("working, p = 80") == "working, p = 80" and called("+ mean shift")[0] == "+"


def test_rules_by_column():
    rules = ExtractSpec(
        neurons={"active": 0.5, "score": "update", "budget": "model"},
        clusters={"count": 4},
        correction={"method": "ridge", "penalty": 1e-4, "sequential": True, "catch_up": 0.5},
        calibration={"images": 60},
    )
    assert rules_row(rules) == {
        "clusters": 4,
        "kept by": "update",
        "share by": "model",
        "weight of all tokens": "0",
        "penalty": "0.0001",
        "made up for": "0.5",
        "head": None,
        "images": 60,
    }
    assert rules_row(rules.but(clusters=ClusterSpec(of="nothing")))["clusters"] is None
    assert rules_row(rules.but(correction={"head": 0.3}))["head"] == "0.3"


def kept(active, *neurons, seed=0):
    """A record whose blocks have so many active neurons, with a share of `active` asked for."""
    rules = ExtractSpec(neurons={"active": active})
    spec = SimpleNamespace(seed=seed, device="cpu", extract=rules)
    return SimpleNamespace(status="ok", spec=spec, extract=[{"active": n} for n in neurons])


def test_active_neurons_by_block_have_the_mean_that_was_asked_for():
    assert active_by_block(kept(0.5, 10.0, 20.0, 60.0)) == {"1": 17.0, "2": 33.0, "3": 100.0}


def test_rows_by_block_come_level_by_level_where_there_is_a_record():
    families = {
        "a": {0.3: [None, kept(0.3, 1.0, 3.0), kept(0.3, 9.0, 9.0, seed=1)], 0.5: [None]},
        "b": {0.5: [kept(0.5, 5.0, 5.0)], 0.3: [kept(0.3, 2.0, 2.0)]},
    }
    assert list(rows_by_block(families)) == [
        {"active": "30%", "arm": "a", "1": 15.0, "2": 45.0},
        {"active": "30%", "arm": "b", "1": 30.0, "2": 30.0},
        {"active": "50%", "arm": "b", "1": 50.0, "2": 50.0},
    ]


def test_arms_without_a_level_are_a_family_by_what_is_active():
    def run(hidden, *active, seed=0):
        spec = SimpleNamespace(seed=seed, backbone=SimpleNamespace(hidden=hidden))
        layers = [{"width": 5, "active": neurons} for neurons in active]
        return SimpleNamespace(status="ok", spec=spec, extract=layers)

    # of 20 neurons, four times the width, and of 40
    wide, narrow = run(None, 5.0, 10.0), run(40, 4.0, 6.0, seed=1)
    assert active_share(wide) == 0.375 and active_share(narrow) == 0.125
    family = by_active_share([[None, wide, narrow], [None], [narrow]])
    assert family == {0.38: [wide, narrow], 0.12: [narrow]}


def test_what_an_extraction_kept_and_found():
    def run(seed, right, val):
        layers = [
            {"width": 5, "active": 5.0, "noise": 0.5, "clusters": 2},
            {"width": 5, "active": 15.0, "noise": 0.1, "clusters": 5},
        ]
        return SimpleNamespace(
            status="ok",
            spec=SimpleNamespace(seed=seed, backbone=SimpleNamespace(hidden=None)),
            extract=layers,
            val={"top1": val},
            cost={"params_stored": 3e6},
            arrays={"test_label": np.ones(4), "test_pred": np.arange(4) < right},
        )

    row = extraction_row([run(0, 2, 70.0), run(1, 3, 90.0), None])
    assert row.pop("test top-1 (%)").mean == pytest.approx(62.5)  # of 2 and 3 in 4
    assert row == {
        "validation top-1 (%)": 70.0,
        "active (%)": pytest.approx(100 * (5 + 15) / 2 / 20),
        "stored (M)": 3.0,
        "noise (%)": pytest.approx(30.0),
        "clusters a layer": 3.5,
    }
    assert list(extraction_row([None])) == list(extraction_row([run(0, 2, 70.0)]))
    assert set(extraction_row([None]).values()) == {None}


def test_a_goal_is_what_is_left_of_the_dense_accuracy():
    assert (goal_of("M.refit30"), goal_of("M.pass50")) == (92.0, 99.0)


def test_a_change_moves_what_is_kept_on_the_seeds_that_both_sides_have():
    dense, plain = runs(right_of(80)), runs(right_of(40, 60, 20))
    tried = {
        "more images": (runs(right_of(48), seeds=[1]), plain),  # 60% of the dense, after 75%
        "an oracle": (runs(right_of(40, 64)), plain),  # 65% on seeds 0 and 1, after 62.5%
        "not run": ([None], plain),
        "nothing beside": (runs(right_of(48), seeds=[9]), plain),
    }
    assert moves(tried, dense) == "more images -15.0 (n=1); an oracle +2.5 (n=2)"
    assert moves({}, dense) == ""
