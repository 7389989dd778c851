"""On how many of timm's models each method works: counted from a file, which must be whole."""

import json

import pytest

from lib import paths
from lib.report import timm_models
from lib.runs.store import Store

SAID = {
    "timm": "1.0.0",
    "torch": "2.0.0",
    "date": "2026-01-02",
    "goals": {"upcycling": 0.75, "pruning": 0.8, "extraction": 0.5},
    "columns": ["family", "model", "upcycling", "pruning", "extraction"],
    "rows": [
        ["vit", "vit_a", "works", "works", "works"],
        ["vit", "vit_b", "works by whole copies", "a norm inside", "a norm inside"],
        ["mixer", "mixer_a", *["works with modules="] * 3],
        ["levit", "levit_a", "works by whole copies with modules=", "no MLP", "a norm inside"],
        ["pvt", "pvt_a", "no MLP", "no MLP", "no MLP"],
    ],
}


@pytest.fixture
def outcomes(tmp_path):
    file = tmp_path / "few.json"
    file.write_text(json.dumps(SAID))
    return timm_models.read(file)


def test_shares_count_what_works_and_how(outcomes):
    up, pruning, extraction = timm_models.shares(outcomes).to_dict("records")
    assert up == {
        "method": "upcycling",
        "works as it is": 2,
        "with modules=": 2,
        "in all": 4,
        "of these by whole copies": 2,
        "share (%)": 80.0,
        "share without modules= (%)": 40.0,
        "goal (%)": 75.0,
        "reached": True,
    }
    assert (pruning["in all"], pruning["share (%)"], pruning["reached"]) == (2, 40.0, False)
    assert (extraction["in all"], extraction["reached"]) == (2, False)


def test_a_family_has_a_row(outcomes):
    rows = timm_models.families(outcomes)
    assert list(rows) == [
        "family",
        "models",
        "MLPs named",
        "upcycling",
        "whole copies",
        "pruning",
        "extraction",
    ]
    assert rows.values.tolist() == [
        ["levit", 1, 1, 1, 1, 0, 0],
        ["mixer", 1, 1, 1, 0, 1, 1],
        ["pvt", 1, 0, 0, 0, 0, 0],
        ["vit", 2, 0, 2, 1, 1, 1],
    ]


def test_reasons_are_counted_by_method_the_commonest_first(outcomes):
    first, second = timm_models.refusals(outcomes).to_dict("records")
    assert first == {
        "reason": "no MLP",
        "upcycling": 1,
        "pruning": 2,
        "extraction": 1,
        "families": "levit, pvt",
    }
    assert second == {
        "reason": "a norm inside",
        "upcycling": 0,
        "pruning": 1,
        "extraction": 2,
        "families": "levit, vit",
    }


def test_the_sentence_states_shares_and_goals(outcomes):
    assert timm_models.in_short(outcomes) == (
        "Of 5 names of timm 1.0.0 in 4 families, upcycling works on 4 (80.0%; the goal of 75% is "
        "reached), pruning works on 2 (40.0%; the goal of 80% is missed), and extraction works on "
        "2 (40.0%; the goal of 50% is missed). 2 of the upcycled models hold whole copies of an "
        "MLP, which is slow."
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        json.dumps(SAID)[:-9],
        json.dumps({**SAID, "rows": []}),
        json.dumps({**SAID, "rows": [["vit", "vit_a", "works"]]}),
        json.dumps({**SAID, "rows": [["vit", "vit_a", "works", "works", None]]}),
        json.dumps({**SAID, "columns": SAID["columns"][::-1]}),
        json.dumps({**SAID, "goals": {"upcycling": 0.9}}),
        json.dumps({key: value for key, value in SAID.items() if key != "timm"}),
    ],
)
def test_a_damaged_file_is_named_with_the_command_that_writes_it(tmp_path, text):
    file = tmp_path / "damaged.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"damaged\.json .*python -m benchmarks\.timm_models"):
        timm_models.read(file)


def test_a_file_that_is_not_there_is_named_with_the_command_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json is not there: `python -m benchm"):
        timm_models.read(tmp_path / "none.json")


def test_the_committed_file_is_whole_and_no_record_of_a_run(tmp_path):
    outcomes = timm_models.read()
    assert outcomes["model"].is_unique
    assert (timm_models.shares(outcomes)["in all"] <= len(outcomes)).all()
    copied = tmp_path / timm_models.FILE.relative_to(paths.RESULTS)
    copied.parent.mkdir(parents=True)
    copied.write_bytes(timm_models.FILE.read_bytes())
    where = Store(tmp_path, tmp_path / "cache")
    assert list(where.facts()) == [] and where.find(copied.stem) is None
