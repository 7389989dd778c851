"""The rules and the layers of an extraction as cells of a table."""

from types import SimpleNamespace

from lib.report.extracted import active_by_block, rules_row
from lib.spec import ClusterSpec, ExtractSpec


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
        "images": 60,
    }
    assert rules_row(rules.but(clusters=ClusterSpec(of="nothing")))["clusters"] is None


def test_active_neurons_by_block_have_the_mean_that_was_asked_for():
    record = SimpleNamespace(
        spec=SimpleNamespace(extract=ExtractSpec(neurons={"active": 0.5})),
        extract=[{"active": neurons} for neurons in (10.0, 20.0, 60.0)],
    )
    assert active_by_block(record) == {"1": 17.0, "2": 33.0, "3": 100.0}
