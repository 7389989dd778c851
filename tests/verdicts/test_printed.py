"""Our values beside printed ones: texts, ratios, and which digits differ."""

import pytest
from factory import record

from lib.verdicts.printed import PrintedCells, beyond_printed, gains_in_order
from lib.verdicts.stats import paired_difference


@pytest.fixture
def cells():
    return PrintedCells({"stored (M)": 1, "FLOPs (G)": 2})


def test_a_row_has_both_values_as_printed_and_their_ratio(cells):
    row = cells.row("T1", "N=8, L=2", {"stored (M)": (38.62, 38.6), "FLOPs (G)": (5.53, 5.60)})
    assert row == {
        "stored (M)": "38.6",
        "stored (M), paper": "38.6",
        "stored (M), ratio": "1.0005",
        "FLOPs (G)": "5.53",
        "FLOPs (G), paper": "5.60",
        "FLOPs (G), ratio": "0.9875",
    }
    assert list(cells) == ["T1 stored N=8, L=2", "T1 FLOPs N=8, L=2"]


def test_cells_are_apart_where_printed_digits_differ(cells):
    cells.row("T1", "a", {"stored (M)": (22.04, 22.0)})
    cells.row("T1", "b", {"stored (M)": (22.06, 22.0)})
    assert list(cells.apart()) == ["T1 stored b"]


def test_telling_are_the_smallest_and_largest_ratios_and_digits_that_differ_each_once(cells):
    for row, ours in {"a": 10.0, "b": 10.02, "c": 9.99, "d": 10.01, "e": 9.98}.items():
        cells.row("T1", row, {"stored (M)": (ours, 10.0)})  # printed alike
    assert {label: round(ratio, 6) for label, ratio in cells.telling(2).items()} == {
        f"T1 stored {row}": ratio
        for row, ratio in {"e": 0.998, "c": 0.999, "d": 1.001, "b": 1.002}.items()
    }
    assert [label[-1] for label in cells.telling(4)] == ["e", "c", "a", "d", "b"]
    cells.row("T1", "f", {"stored (M)": (100.06, 100.0)})  # printed as 100.1
    assert [label[-1] for label in cells.telling(1)] == ["e", "f", "b"]
    assert list(cells.telling(2)) == sorted(cells.telling(2), key=lambda label: cells[label].ratio)


def test_a_column_needs_its_decimals(cells):
    with pytest.raises(KeyError, match="active"):
        cells.row("T1", "a", {"active (M)": (1.0, 1.0)})


def test_gains_beyond_the_printed_ones_are_paired_by_seed_where_they_can_be():
    dense, moe = ([record(seed, top1=top1) for seed in range(3)] for top1 in (60.0, 62.0))
    gain = paired_difference(moe, dense)
    beyond = beyond_printed(moe, dense, 0.5)
    assert beyond.mean == pytest.approx(gain.mean - 0.5) and beyond.n == 3
    assert (beyond.low, beyond.high) == pytest.approx((gain.low - 0.5, gain.high - 0.5))
    one = beyond_printed(moe[1:2], dense, 0.5)  # against the dense model of the same seed alone
    assert one.mean == pytest.approx(moe[1].test["top1"] - dense[1].test["top1"] - 0.5)
    assert one.low is None and one.n == 1
    stranger = [record(7, top1=62.0)]  # no seed in common: against the mean of all dense models
    mean = sum(r.test["top1"] for r in dense) / 3
    assert beyond_printed(stranger, dense, 0.0).mean == pytest.approx(
        stranger[0].test["top1"] - mean
    )
    assert beyond_printed([None], dense, 0.5) is None and paired_difference(moe, [None]) is None


def test_gains_in_the_printed_order_go_from_the_lower_to_the_higher_setting():
    ours = {"low": 62.0, "high": 60.0, "as low": 50.0}
    records = {name: [record(seed, top1=top1) for seed in range(3)] for name, top1 in ours.items()}
    printed = {"high": 90.0, "low": 80.0, "as low": 80.0, "absent": 70.0}
    gains = gains_in_order(records, printed)
    # all pairs but that of the two that are printed alike
    assert [gain and gain.mean for gain in gains] == [
        paired_difference(records["high"], records["low"]).mean,
        paired_difference(records["high"], records["as low"]).mean,
        None,
        None,
        None,
    ]
    assert gains[0].mean < 0 < gains[1].mean
