"""Rows of the cost table: sizes, and multiply-adds compared to those of a dense run."""

from types import SimpleNamespace

import pytest

from lib.verdicts.costs import cost_rows


def run(seed=0, macs=4e9, stored=30_000_000, status="ok"):
    """A record with the costs that the table reads."""
    return SimpleNamespace(
        status=status,
        spec=SimpleNamespace(seed=seed, device="cpu"),
        cost={"params_stored": stored, "params_active": 22_000_000, "macs": macs},
        timing={"eval_images_per_s": 1600.0},
    )


def test_a_row_in_the_units_of_its_columns_without_times_that_other_work_disturbed():
    [row] = cost_rows({"dense": [run()]})
    assert row == {"model": "dense", "stored (M)": 30.0, "active (M)": 22.0, "MACs (G)": 4.0}


def test_one_row_a_name_of_its_first_finished_seed():
    records = {
        "failed first": [run(0, status="failed"), run(1, stored=15e6), run(2, stored=10e6)],
        "absent": [None],
        "nothing planned": [],
    }
    rows = {row["model"]: row["stored (M)"] for row in cost_rows(records)}
    assert rows == {"failed first": 15.0}


def test_keys_choose_and_order_the_rows():
    records = {"a": [run()], "b": [run()], "c": [run()]}
    assert [row["model"] for row in cost_rows(records, keys=["c", "a", "unplanned"])] == ["c", "a"]
    assert not list(cost_rows(records, keys=[]))


def test_multiply_adds_are_compared_to_the_dense_ones():
    records = {"dense": [run()], "half": [run(macs=2e9)]}
    dense, half = cost_rows(records, dense="dense")
    assert (dense["MACs (% of dense)"], half["MACs (% of dense)"]) == (100.0, pytest.approx(50.0))
    [shown] = cost_rows(records, dense="dense", keys=["half"])  # the dense one need not be shown
    assert shown == half


@pytest.mark.parametrize("dense", [[], [None], [run(status="failed")]])
def test_without_a_dense_record_nothing_is_compared(dense):
    rows = {row["model"]: row for row in cost_rows({"dense": dense, "moe": [run()]}, "dense")}
    assert list(rows) == ["moe"] and "MACs (% of dense)" not in rows["moe"]
