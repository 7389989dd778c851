"""Models beside the dense one they were made of: by hand, and what is left out."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.verdicts.sizes import (
    SizedModel,
    best_on_validation,
    retained_change,
    sized_models,
)
from lib.verdicts.stats import beyond_line, retained


def run(top1, size, seed=0, status="ok", val=0.0):
    """A record that is right on the first so many percent of 1,000 test images."""
    label = np.zeros(1000, int)
    return SimpleNamespace(
        status=status,
        spec=SimpleNamespace(seed=seed, device="cpu"),
        cost={"params_stored": size, "macs": 2 * size + 10},
        val={"top1": val},
        id=f"{top1}",
        arrays={"test_label": label, "test_pred": (np.arange(1000) >= 10 * top1).astype(int)},
    )


DENSE = [run(80.0, 100, seed=7)]


def test_shares_are_those_of_the_dense_model():
    (model,) = sized_models({"cut": {0.5: [run(60.0, 40), run(40.0, 999, seed=1)]}}, DENSE)
    assert (model.method, model.level) == ("cut", 0.5)
    assert model.params_stored == pytest.approx(40)  # of the first seed
    assert model.macs == pytest.approx(100 * 90 / 210)
    assert (model.top1.mean, model.top1.n) == (pytest.approx(50), 2)
    assert model.retained.mean == pytest.approx(100 * 50 / 80)


def test_models_come_level_by_level_and_only_where_they_are_planned():
    families = {"a": {0.3: [run(50.0, 30)], 0.5: [run(60.0, 50)]}, "b": {0.5: [run(70.0, 50)]}}
    found = [(model.method, model.level) for model in sized_models(families, DENSE)]
    assert found == [("a", 0.3), ("a", 0.5), ("b", 0.5)]


@pytest.mark.parametrize("records", [[None], [run(60.0, 40, status="failed")], []])
def test_a_model_without_a_record_has_no_numbers(records):
    assert sized_models({"cut": {0.5: records}}, DENSE) == [SizedModel("cut", 0.5)]


def test_without_the_dense_model_nothing_has_a_share():
    assert sized_models({"cut": {0.5: [run(60.0, 40)]}}, [None]) == [SizedModel("cut", 0.5)]


def test_change_of_what_is_retained_by_hand():
    """60, 62 and 64% of 80% are 75, 77.5 and 80% of it: 22.5% are lost."""
    ours = [run(60.0 + 2 * seed, 50, seed) for seed in range(3)]
    kept, change = retained(ours, DENSE), retained_change(ours, DENSE)
    assert change.mean == pytest.approx(-22.5)
    assert (change.low, change.high) == (kept.low - 100, kept.high - 100)
    assert change.law.below(-22.5) == pytest.approx(0.5) and change.n == 3
    alone = retained_change(ours[:1], DENSE)
    assert (alone.mean, alone.low, alone.n) == (pytest.approx(-25), None, 1)
    assert retained_change(ours, [None]) is None and retained_change([None], DENSE) is None


@pytest.mark.parametrize("size", ["params_stored", "macs"])  # macs grow with storage here
def test_family_is_a_line_over_either_size(size):
    """The family's line over stored parameters: (40, 50), (60, 70), and the dense (100, 80)."""
    family = [[run(top1, x, seed) for seed in range(3)] for x, top1 in ((40, 50.0), (60, 70.0))]

    def beyond(top1, stored):
        ours = [run(top1, stored, seed) for seed in range(3)]
        return beyond_line(ours, family, DENSE, size)

    assert beyond(70.0, 50).mean == pytest.approx(10)
    assert beyond(50.0, 50).mean == pytest.approx(-10)
    assert beyond(76.0, 80).mean == pytest.approx(1)
    assert beyond(70.0, 39) is None  # smaller than all of the family


def test_best_on_validation_looks_at_validation_alone():
    settings = {"a": [run(90.0, 1, val=70.0)], "b": [run(10.0, 1, val=71.0)]}
    assert best_on_validation(settings) == "b"


def test_best_on_validation_compares_equally_many_seeds():
    settings = {
        "two seeds": [run(50.0, 1, seed, val=60.0) for seed in range(2)],
        "better, two seeds": [run(50.0, 1, seed, val=v) for seed, v in enumerate((60.0, 64.0))],
        "lucky": [run(50.0, 1, val=99.0), None],
        "failed": [run(50.0, 1, seed, "failed", val=99.0) for seed in range(2)],
    }
    assert best_on_validation(settings) == "better, two seeds"
    ten = [run(50.0, 1, seed, val=61.0 if seed < 3 else 99.0) for seed in range(10)]
    three = [run(50.0, 1, seed, val=62.0) for seed in range(3)]
    assert best_on_validation(settings | {"ten seeds": ten, "three": three}) == "three"
    assert best_on_validation({"ten seeds": ten, "lucky": settings["lucky"]}) == "ten seeds"
    with pytest.raises(ValueError, match="a, b share no seed"):
        best_on_validation({"a": [run(50.0, 1, 0)], "b": [run(50.0, 1, 1)]})
    assert best_on_validation({"a": [None], "b": []}) is None
    assert best_on_validation({}) is None
