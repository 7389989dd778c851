"""Measurements of speed: what a row says, and files that are read only if they are whole."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import __main__ as command
from lib import paths
from lib.runs.index import checksum_of
from lib.runs.store import Store
from lib.verdicts import speed
from lib.verdicts.speed import Ratio, Timing

SIDES = {"what": "forward", "shape": "B=1", "dtype": "fp32", "ours_is": "layer", "against": "bound"}
MACHINE = {"load_average": [0.4, 2.0]}
ABOUT = {"command": "make bench", "date": "2026-01-01 00:00 UTC", "machine": MACHINE}


def ratio(ours=2.0, other=1.0, **options):
    times = {"ours": Timing(ours, ours / 2), "other": Timing(other, other)}
    return Ratio(**({"part": "layer"} | SIDES | times | options))


def test_a_ratio_is_the_share_of_its_limit():
    row = ratio(ours=4.0, other=6.0, ideal=2.0, goal=0.75)
    assert (row.ratio, row.low_ratio, row.reached) == (0.75, 1.5, True)
    assert ratio(ours=4.0, other=6.0, ideal=2.0, goal=0.76).reached is False
    assert ratio().reached is None
    absent = Ratio(part="peers", goal=1.0, note="not installed", **SIDES)
    assert (absent.ratio, absent.low_ratio, absent.reached, absent.cause) == (None, None, None, "")


def test_a_cause_adds_up_to_the_distance_from_the_bound():
    beside = {"one MLP": Timing(1.0, 1.0), "equal chunks": Timing(1.5, 1.5)}
    assert ratio(ours=2.25, beside=beside).cause == (
        "several weights in place of one +0.5 ms; "
        "routing, gather, unequal slices and combine +0.8 ms"
    )
    beside = {"static model": Timing(7.0, 7.0)}
    beside["whole model at the ratio of multiply-adds"] = Timing(6.0, 6.0)
    assert ratio(ours=6.5, beside=beside).cause == (
        "what does not shrink with the neurons +1.0 ms; routing and several experts -0.5 ms"
    )
    # from the bound of the row on
    assert ratio(ours=8.0, against="static model", beside=beside).cause == (
        "routing and several experts +1.0 ms"
    )
    assert ratio().cause == ""


def in_turns(ours, other, part="peers", **sides):
    times = {"ours": Timing(ours, ours), "other": Timing(other, other)}
    return Ratio(**(SIDES | {"part": part} | times | sides))


TURNS = (  # plain 6 ms, frozen 8; dense MLPs 5, packed ones 4; the other layer 5
    in_turns(6.0, 5.0, "layer"),
    in_turns(8.0, 5.0, "layer", ours_is="layer, frozen"),
    in_turns(8.0, 4.0, "layer", ours_is="layer, frozen", against="one MLP, packed"),
    in_turns(8.0, 5.0, ours_is="layer, frozen", against="fastest peer", goal=1.0),
    in_turns(3.0, 5.0, shape="B=2", ours_is="layer, frozen", against="fastest peer", goal=1.0),
    in_turns(9.0, 8.0, what="forward+backward", against="fastest peer", goal=1.0),
    in_turns(9.0, 3.0, "layer", what="forward+backward"),
)


def test_beside_another_layer_a_plain_one_of_the_same_turns_stands_for_a_frozen_one():
    measured = speed.Measurement(ABOUT, TURNS)
    assert [row.is_frozen for row in TURNS] == [False, True, True, True, True, False, False]
    plain = measured.plain(TURNS[3])
    assert (plain.ours_is, plain.ours.median, plain.ratio) == ("layer", 6.0, 5 / 6)
    assert measured.plain(TURNS[4]) is None  # nothing plain was timed at that shape
    assert measured.plain(TURNS[5]) is TURNS[5]


def test_a_cause_beside_another_layer_says_what_packing_costs_and_what_the_bound_allows():
    measured = speed.Measurement(ABOUT, TURNS)
    assert measured.cause(TURNS[3]) == (
        "packed weights +2.0 ms, plain ratio 0.833; at the dense bound the ratio would be 1.250"
    )
    assert measured.cause(TURNS[5]) == "at the dense bound the ratio would be 2.667"
    assert measured.cause(TURNS[4]) == ""
    chunks = {"equal chunks": Timing(1.5, 1.5)}
    assert measured.cause(ratio(beside=chunks)) == ratio(beside=chunks).cause != ""


def test_a_measurement_is_read_as_it_was_written(tmp_path):
    absent = Ratio(part="peers", note="not installed", **SIDES)
    rows = (ratio(goal=0.9, beside={"one MLP": Timing(1.0, 0.9)}), absent, ratio(goal=0.7))
    speed.write(tmp_path / "short.json", ABOUT, rows)
    read = speed.read(tmp_path / "short.json")
    assert read.rows == rows and read.about == ABOUT and not read.disturbed
    assert read.of("layer") == [rows[0], rows[2]] and read.of("peers") == []
    assert read.short == [rows[0], rows[2]]  # farthest from its goal first
    assert read.promised == [rows[0], rows[2]]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: text.replace('"median": 2.0', '"median": 1.0'), "checksum does not match"),
        (lambda text: text.replace('"checksum"', '"sum"'), "checksum does not match"),
        (lambda text: "[]", "no JSON object"),
        (lambda text: "\xff", "damaged"),
    ],
)
def test_a_damaged_measurement_is_refused_by_name(tmp_path, damage, says):
    file = tmp_path / "full.json"
    speed.write(file, ABOUT, [ratio()])
    file.write_text(damage(file.read_text()), encoding="latin-1")
    with pytest.raises(ValueError, match=says) as error:
        speed.read(file)
    assert str(file) in str(error.value) and "make bench-full" in str(error.value)


@pytest.mark.parametrize("change", [{"version": 99}, {"rows": [{"part": "layer"}]}])
def test_a_measurement_of_another_form_is_refused_by_name(tmp_path, change):
    file = tmp_path / "short.json"
    speed.write(file, ABOUT, [ratio()])
    content = json.loads(file.read_text()) | change
    del content["checksum"]
    file.write_text(json.dumps(content | {"checksum": checksum_of(content)}))
    with pytest.raises(ValueError, match="damaged") as error:
        speed.read(file)
    assert str(file) in str(error.value)


def test_an_absent_measurement_says_which_command_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="short.json; measure anew: make bench$"):
        speed.read(tmp_path / "short.json")


def test_the_same_measurement_from_other_machines_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BENCH", tmp_path)
    assert speed.elsewhere("short") == []
    for name, capabilities in {
        "short": {"avx2": True, "avx512": True, "avx512_bf16": True, "amx": True},
        "short-old": {"avx2": True, "avx512": False},
        "short-arm": {"avx2": False},
        "full-old": {"avx2": True},
    }.items():
        machine = MACHINE | {"processor": "P", "capabilities": capabilities}
        speed.write(speed.file_of(name), ABOUT | {"machine": machine}, [ratio()])
    names = [measured.machine_name for measured in speed.elsewhere("short")]
    assert names == ["P", "P with AVX2, without bf16 products"]
    assert speed.read(speed.file_of("short")).machine_name == "P with AMX"
    speed.file_of("short-old").write_text("{}")
    with pytest.raises(ValueError, match="measure anew: make bench$"):
        speed.elsewhere("short")


def test_rows_of_an_unfinished_measurement_are_kept_beside_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "full.json"
    speed.write(out, ABOUT, [ratio(shape="old")])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--full", "--out", str(out)])

    def rows(full, repeats, fails=True):
        assert full and repeats == command.FULL_REPEATS
        yield ratio(shape="new")
        if fails:
            raise KeyboardInterrupt
        yield ratio(shape="newer")

    monkeypatch.setattr(command, "measured", rows)
    with pytest.raises(KeyboardInterrupt):
        command.main()
    [part] = tmp_path.glob("*.part")
    assert [row.shape for row in speed.read(part).rows] == ["new"]
    assert [row.shape for row in speed.read(out).rows] == ["old"]
    monkeypatch.setattr(command, "measured", lambda *options: rows(*options, fails=False))
    command.main()
    assert [row.shape for row in speed.read(out).rows] == ["new", "newer"]
    assert [*tmp_path.iterdir()] == [out]


def test_the_store_takes_no_measurement_for_a_record(tmp_path):
    inside = speed.file_of("short").relative_to(paths.RESULTS)
    speed.write(tmp_path / inside, ABOUT, [ratio()])
    assert Store(tmp_path, tmp_path / "private").find("short") is None
    assert [*tmp_path.glob("*/*.json")] == [] and [*tmp_path.glob("*/*/*.json")] != []


def test_committed_measurements_are_whole_and_say_where_they_were_made():
    # the count on timm's models lies beside them and is no measurement
    files = sorted(f for f in paths.BENCH.glob("*/*.json") if f.stem in ("short", "full"))
    assert speed.file_of("short") in files  # the page on speed shows it
    for file in files:
        read = speed.read(file)
        assert file == speed.file_of(file.stem, file.parent.name)
        assert {row.part for row in read.rows} <= set(speed.PARTS)
        assert all(row.ratio is not None or row.note for row in read.rows)
        about, machine = read.about, read.about["machine"]
        assert about["command"].startswith(("make bench", "python -m benchmarks"))
        assert {"processor", "cores", "threads", "versions", "capabilities"} <= set(machine)
        assert len(machine["load_average"]) == 2


def test_times_in_percent_of_the_dense_model(tmp_path):
    sides = {"part": "models", "what": "forward", "against": "dense", "ours": Timing(3.0, 2.0)}
    shape = {"other": Timing(4.0, 1.0), "shape": "batch 16, frozen"}
    rows = (
        Ratio(**sides, **shape, ours_is="half", dtype="fp32"),
        Ratio(**sides, **shape, ours_is="half", dtype="bf16"),
        Ratio(**sides, **shape | {"shape": "batch 1, frozen"}, ours_is="whole", dtype="fp32"),
    )
    file = tmp_path / "frontier.json"
    assert speed.percent_of_dense(file, "batch 16, frozen", "fp32") == {}
    speed.write(file, ABOUT, rows)
    assert speed.percent_of_dense(file, "batch 16, frozen", "fp32") == {"half": 75.0}
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged.*python -m benchmarks.frontier"):
        speed.percent_of_dense(file, "batch 16, frozen", "fp32")
