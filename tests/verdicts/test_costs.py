"""Rows of the cost table: sizes, speeds, and the limit that a dense run sets."""

from types import SimpleNamespace

import pytest

from lib.verdicts.costs import cost_rows


def run(seed=0, macs=4e9, train=200.0, status="ok"):
    """A record with the costs that the table reads. train: images a second, None = untrained."""
    timing = {"eval_images_per_s": 1600.0}
    return SimpleNamespace(
        status=status,
        spec=SimpleNamespace(seed=seed, device="cpu"),
        cost={"params_stored": 30_000_000, "params_active": 22_000_000, "macs": macs},
        timing=timing if train is None else timing | {"train_images_per_s": train},
    )


def test_a_row_in_the_units_of_its_columns():
    [row] = cost_rows({"dense": [run()]})
    assert row == {
        "model": "dense",
        "stored (M)": 30.0,
        "active (M)": 22.0,
        "MACs (G)": 4.0,
        "training (images/s)": 200.0,
        "evaluation (images/s)": 1600.0,
    }


def test_one_row_a_name_of_its_first_finished_seed():
    records = {
        "failed first": [run(0, status="failed"), run(1, train=150.0), run(2, train=100.0)],
        "absent": [None],
        "nothing planned": [],
        "untrained": [run(train=None)],
    }
    rows = {row["model"]: row["training (images/s)"] for row in cost_rows(records)}
    assert rows == {"failed first": 150.0, "untrained": None}


def test_keys_choose_and_order_the_rows():
    records = {"a": [run()], "b": [run()], "c": [run()]}
    assert [row["model"] for row in cost_rows(records, keys=["c", "a", "unplanned"])] == ["c", "a"]
    assert not list(cost_rows(records, keys=[]))


def test_the_limit_is_the_dense_speed_scaled_by_multiply_adds():
    records = {"dense": [run()], "twice": [run(macs=8e9, train=25.0)], "head": [run(train=None)]}
    dense, twice, head = cost_rows(records, limit="dense")
    # half of 200 images/s at twice the multiply-adds, and a quarter of it is reached
    assert (twice["limit (images/s)"], twice["share of limit"]) == (pytest.approx(100.0), "0.25")
    assert (dense["limit (images/s)"], dense["share of limit"]) == (pytest.approx(200.0), "1.00")
    assert "share of limit" not in head
    [shown] = cost_rows(records, limit="dense", keys=["twice"])  # the limit need not be shown
    assert shown == twice


@pytest.mark.parametrize("dense", [[], [None], [run(status="failed")]])
def test_without_a_dense_record_there_is_no_limit(dense):
    rows = {row["model"]: row for row in cost_rows({"dense": dense, "moe": [run()]}, "dense")}
    assert list(rows) == ["moe"] and "limit (images/s)" not in rows["moe"]
