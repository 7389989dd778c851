"""Figure and table of measured speeds: every row once, goals marked, sides told apart in grey."""

from __future__ import annotations

import pytest

from lib.report.speeds import beside_others, by_machine, is_frozen, label, shares, speed_table
from lib.report.style import luma
from lib.verdicts.speed import FASTEST_PEER, Measurement, Ratio, Timing


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
    assert [is_frozen(row) for row in ROWS[:4]] == [True, False, False, True]


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


def measured(processor, *rows):
    machine = {"processor": processor, "capabilities": {"avx2": True}}
    return Measurement({"machine": machine}, rows)


def test_machines_stand_side_by_side_whatever_form_of_the_bound_was_the_faster_one():
    chunks = row(against="equal chunks", goal=0.97, other=Timing(2.0, 2.0))
    no_bf16 = row(dtype="bf16", goal=0.9, ours=None, other=None, note="no bf16 products")
    one, two = measured("One", ROWS[1], ROWS[2]), measured("Two", chunks, no_bf16)
    frame = by_machine([one, two], "Shares of the bound.").frame
    first, second = frame.iloc[0], frame.iloc[1]
    assert len(frame) == 2 and first["against"] == "plain dense MLPs"
    assert [first[m.machine_name] for m in (one, two)] == ["0.50", "1.00"]
    assert [second[m.machine_name] for m in (one, two)] == ["", ""]  # no goal; not measured


def test_what_drops_tokens_is_no_layer_to_be_compared_with():
    times = {"loop": 2.0, "theirs": 3.0, "dropping": 0.5}
    peers = [
        row(against=name, part="peers", other=Timing(time, time), note=note)
        for (name, time), note in zip(times.items(), ("", "", "drops tokens"), strict=True)
    ]
    fastest = row(
        against=FASTEST_PEER, part="peers", other=Timing(2.0, 2.0), note="loop, of the 2", goal=1.0
    )
    said = beside_others(measured("One", *peers, fastest))
    assert said.startswith("in 1 of 1 settings beside loop / theirs (One with AVX2")
