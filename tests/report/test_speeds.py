"""Figure and table of measured speeds: every row once, goals marked, sides told apart in grey."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.report.speeds import (
    beside_others,
    by_machine,
    goals_reached,
    in_one_layer,
    in_whole_models,
    label,
    not_measured,
    peer_table,
    shares,
    shortfalls,
    speed_table,
    timed_on,
)
from lib.report.style import luma
from lib.verdicts.speed import FASTEST_PEER, MEDIAN_PEER, Measurement, Ratio, Timing


def row(dtype="fp32", ours_is="layer", against="one MLP", part="layer", shape="B=1", **more):
    times = {"ours": Timing(2.0, 1.6), "other": Timing(1.0, 1.0)} | more
    sides = {"dtype": dtype, "ours_is": ours_is, "against": against, "shape": shape}
    return Ratio(part=part, what="forward", **sides, **times)


ROWS = [
    row(part="models", against="whole model", shape="batch 1, frozen", goal=0.9),
    row(goal=0.97),
    row(dtype="bf16", against="equal chunks"),
    row(dtype="bf16", ours_is="layer, frozen", against="one MLP, packed", goal=0.8),
    row(dtype="autocast"),
    row(against="transformers, eager", part="peers", ours=None, other=None, note="not installed"),
]


def test_rows_of_one_shape_share_a_label_whatever_dtype_and_form_of_the_bound():
    assert label(ROWS[1]) == label(ROWS[2]) == "forward, B=1\nagainst plain dense MLPs"
    assert label(ROWS[3]) == "forward, B=1\nagainst packed dense MLPs"
    assert label(ROWS[0]) == "forward, batch 1\nagainst whole model"
    assert [row.is_frozen for row in ROWS[:4]] == [True, False, False, True]


def test_the_figure_draws_measured_rows_by_part_with_their_goals():
    ax = shares(ROWS).axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        label(ROWS[1]),
        label(ROWS[3]),
        label(ROWS[0]),
    ]
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert {"fp32", "fp32, frozen", "bf16", "bf16, frozen", "goal"} <= set(lines)
    assert sorted(lines["goal"].get_xdata()) == [0.8, 0.9, 0.97]
    drawn = [len(line.get_xdata()) for name, line in lines.items() if name.startswith(("f", "b"))]
    assert sum(drawn) == 4
    looks = {(line.get_marker(), round(luma(line.get_color()), 1)) for line in lines.values()}
    assert len(looks) == len(lines)


def test_a_figure_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no row was measured"):
        shares(ROWS[-1:])


def test_the_table_has_every_row_and_no_number_where_nothing_was_measured():
    frame = speed_table(ROWS, "Speeds.").frame
    assert len(frame) == len(ROWS)
    first, last = frame.iloc[0], frame.iloc[-1]
    assert (first["ours (ms)"], first["against (ms)"]) == ("2.0 (1.6)", "1.0 (1.0)")
    assert (first["ratio"], first["ratio of 10% quantiles"]) == ("0.50", "0.62")
    assert first["reached"] == "no"
    assert (last["ours (ms)"], last["ratio"], last["reached"]) == ("", "", "")
    assert last["note"] == "not installed"


def test_a_third_decimal_stands_where_two_would_hide_a_miss():
    frame = speed_table(
        [
            row(goal=1.0, other=Timing(1.996, 1.0)),  # 0.998
            row(goal=0.704, other=Timing(1.4, 1.0)),  # 0.70
            row(goal=0.9, other=Timing(1.6, 1.0)),  # 0.80
            row(goal=1.0, other=Timing(2.0, 1.0)),
        ],
        "Speeds.",
    ).frame
    assert list(frame["ratio"]) == ["0.998", "0.700", "0.80", "1.00"]
    assert list(frame["goal"]) == ["1.000", "0.704", "0.90", "1.00"]
    assert list(frame["reached"]) == ["no", "no", "no", "yes"]


def measured(processor, *rows, date="2026-01-01 00:00 UTC", **capabilities):
    machine = {"processor": processor, "capabilities": {"avx2": True} | capabilities}
    machine |= {"threads": 2, "load_average": [0.1, 2.0]}
    return Measurement({"machine": machine, "date": date}, rows)


def test_machines_stand_side_by_side_whatever_form_of_the_bound_was_the_faster_one():
    chunks = row(against="equal chunks", goal=0.97, other=Timing(2.0, 2.0))
    no_bf16 = row(dtype="bf16", goal=0.9, ours=None, other=None, note="no bf16 products")
    one, two = measured("One", ROWS[1], ROWS[2]), measured("Two", chunks, no_bf16)
    frame = by_machine([one, two], "Shares of the bound.").frame
    first, second = frame.iloc[0], frame.iloc[1]
    assert len(frame) == 2 and first["against"] == "plain dense MLPs"
    assert [first[m.machine_name] for m in (one, two)] == ["0.50", "1.00"]
    # a row without its goal; a row without times
    assert [second[m.machine_name] for m in (one, two)] == ["not measured", "not measured"]


def test_what_drops_tokens_is_no_layer_to_be_compared_with():
    times = {"loop": 2.0, "theirs": 3.0, "dropping": 0.5}
    peers = [
        row(against=name, part="peers", other=Timing(time, time), note=note)
        for (name, time), note in zip(times.items(), ("", "", "drops tokens"), strict=True)
    ]
    fastest = row(
        against=FASTEST_PEER, part="peers", other=Timing(2.0, 2.0), note="loop, of the 2", goal=1.0
    )
    one = measured("One", *peers, fastest)
    assert beside_others([one]).endswith("in 1 of 1 settings.")
    table = peer_table([one], "Beside the fastest.")
    assert table.caption.endswith("without bf16 products beside: loop, theirs.")


def peer(ours_is, ours, other, against=FASTEST_PEER, **more):
    times = {"ours": Timing(ours, ours), "other": other and Timing(other, other)}
    sides = {"against": against, "ours_is": ours_is, "shape": "B=1 E=8 K=1", "goal": 1.0}
    return row(part="peers", **(times | sides | {"note": "loop, of the 2"} | more))


def test_plain_and_frozen_are_counted_apart():
    frozen = "layer, frozen"
    one = measured(
        "One",
        row(shape="B=1 E=8 K=1", ours=Timing(4.0, 4.0), other=Timing(3.0, 3.0)),
        peer(frozen, 2.0, 3.0),
        peer("layer", 3.0, 3.0, shape="B=2 E=8 K=1"),
    )
    loop, drops = replace(peer("layer", 3.0, 2.0), against="loop", note=""), "drops tokens"
    dropping = replace(loop, against="dropping", note=drops)
    two = measured("Two", peer("layer", 3.0, 2.0), loop, dropping)
    # the frozen one does not count
    assert beside_others([one, two]).endswith("in 1 of 3 settings.")
    assert timed_on([one, two]) == (
        f"Timed on {one.machine_name}, 2 threads, beside 0 other layers; "
        f"on {two.machine_name}, 2 threads, beside 1 other layer."
    )
    frame = peer_table([one], "Beside the fastest.").frame
    assert list(frame["plain, against plain"]) == ["0.750", "1.000"]
    assert list(frame["frozen, against plain"]) == ["1.500", ""]
    assert set(frame["fastest other"]) == {"loop"}


def test_a_layer_has_its_share_of_the_bound_on_all_machines_and_no_frozen_one():
    one = measured("One", ROWS[1], ROWS[3], row(other=Timing(1.6, 1.6)))
    two = measured("Two", row(other=Timing(2.0, 2.0)), ROWS[5])
    assert in_one_layer([one, two]).endswith("multiply as much (median 0.80).")
    assert "reaches 0.50 to 1.00 of the speed" in in_one_layer([one, two])


def test_a_whole_model_is_said_as_fast_as_at_best_by_batch():
    sides = {"part": "models", "against": "whole model", "ideal": 1.42}

    def model(batch, other, ours_is="extracted", **more):
        times = {"ours": Timing(1.0, 1.0), "other": Timing(other, other)}
        return row(shape=f"batch {batch}, plain", ours_is=ours_is, **sides | times | more)

    one = measured("One", model(1, 0.9), model(16, 1.2), model(16, 1.4, "static model"))
    two = measured("Two", model(16, 1.3), model(16, 1.5, against="static model"))
    assert in_whole_models([one, two]).endswith(
        "multiplies 1.42 times less than the dense one; times as fast at best: "
        "1.30 at batch 16 and 0.90 at batch 1."
    )
    assert in_whole_models([one, two]).startswith("**Faster at batch 16, not at batch 1:** ")
    only = measured("One", model(1, 1.1), model(16, 1.2))
    assert in_whole_models([only]).startswith("**Faster at batch 16 and batch 1:** ")
    three = measured("One", model(64, 1.4), model(1, 1.1), model(16, 1.2))
    assert in_whole_models([three]).endswith(
        "1.40 at batch 64, 1.20 at batch 16 and 1.10 at batch 1."
    )
    assert "Faster at batch 64, batch 16 and batch 1:" in in_whole_models([three])
    slow = measured("One", model(1, 1.004), model(16, 0.9))
    assert in_whole_models([slow]).startswith("**No:** ")


def test_goals_that_a_machine_could_not_measure_are_named_with_the_reason():
    bf16 = {"part": "layer", "dtype": "bf16"}
    one = measured(
        "One",
        row(goal=0.4, **bf16),
        row(goal=0.9, against="one MLP, packed"),
        peer("layer", 2.0, 3.0),
        peer("layer", 2.0, 3.0, MEDIAN_PEER, goal=None, note="of the 1 that compute the same"),
        # nobody has a goal for four experts
        peer("layer", 2.0, 3.0, MEDIAN_PEER, goal=None, shape="B=1 E=4 K=1"),
    )
    two = measured(
        "Two",
        row(ours=None, other=None, against="bound", note="no bf16 products", **bf16),
        peer("layer", 4.0, 3.0),
        peer("layer", 2.0, 3.0, MEDIAN_PEER, goal=1.3, note="of the 2"),
    )
    assert goals_reached([one, two]) == (
        f"Goals of the benchmark reached: 2 of 3 on {one.machine_name}, 1 more not measured; "
        f"1 of 2 on {two.machine_name}, 2 more not measured."
    )
    assert not_measured([one, two]) == (
        f" Not measured: on {one.machine_name}, a median wants two other layers that compute the "
        f"same: 1 row. Not measured: on {two.machine_name}, no bf16 products: 1 row; no packed "
        "dense MLPs to compare with: 1 row."
    )
    alone = goals_reached([measured("One", *one.rows[:2])])
    assert "not measured" not in alone and not_measured([measured("One", *one.rows[:2])]) == ""
    frame = by_machine([one, two], "Shares.").frame
    of_median = frame[frame["against"] == MEDIAN_PEER]
    assert list(of_median[one.machine_name]) == ["not measured"]
    assert list(of_median[two.machine_name]) == ["1.50"]


def test_shortfalls_of_all_machines_stand_in_one_table_with_their_causes():
    chunks = {"one MLP": Timing(1.0, 1.0), "equal chunks": Timing(1.5, 1.5)}
    one = measured("One", row(goal=0.9, beside=chunks), row(goal=0.4))
    two = measured("Two", peer("layer", 4.0, 1.0), row(shape="B=1 E=8 K=1", other=Timing(2.0, 2.0)))
    frame = shortfalls([one, two], "Short.").frame
    assert list(frame["processor"]) == [two.machine_name, one.machine_name]
    assert list(frame["ratio"]) == ["0.25", "0.50"]
    assert list(frame["against"]) == ["fastest peer: loop", "one MLP"]
    assert frame["cause"][0] == "at the dense bound the ratio would be 0.500"
    assert frame["cause"][1].startswith("several weights in place of one +0.5 ms")
    assert len(shortfalls([measured("One")], "Short.").frame) == 0
