"""The front page: its answers follow from the verdicts, and it names nothing that is not there."""

from __future__ import annotations

import json

import pytest
import yaml

from lib import paths
from lib.pages import front
from lib.paths import ROOT
from lib.verdicts import ledger, speed
from lib.verdicts.speed import Ratio, Timing


def row(name, verdict, after=True, **more):
    found = {"id": name, "statement": f"Claim {name}.", "part_of": None, "effect": 1.0}
    given = {"verdict": verdict, "after_correction": after, "reason": None, "text": "+1, n=3; all"}
    return found | given | more


@pytest.mark.parametrize(
    "words, said",
    [
        (["holds", "holds, smaller than published"], "*Yes:* 2 of 2 claims on it hold."),
        (["opposite", "not reproduced"], "*No:* 0 of 2 claims on it hold."),
        (["holds", "undecided", None], "*In part:* 1 of 3 claims on it hold, 2 still open."),
        (["opposite", "undecided"], "*Not so far:* 0 of 2 claims on it hold, 1 still open."),
        (["undecided", None], "*Open:* none of the claims on it is decided yet."),
    ],
)
def test_a_question_is_answered_by_its_verdicts(words, said):
    assert front.lead([row(f"A{i}", word) for i, word in enumerate(words)]) == said


def test_a_line_has_verdict_claim_number_and_link():
    rows = {"A1": row("A1", "holds", after=False), "A1a": row("A1a", None, part_of="A1")}
    link = '(<a href="verdicts.html#claim-A1">A1</a>)'
    assert front._bullet(rows["A1"], rows) == f"- ✔ *holds, alone*: Claim A1: +1, n=3 {link}"
    said = front._bullet(rows["A1a"] | {"effect": None, "text": None}, rows)
    assert said.startswith("- – *not judged yet*: Claim A1. Claim A1a (<a href=")


def test_what_the_book_has_not_is_named():
    content = {
        "questions": [{"ask": "?", "claims": ["A1", "A7"]}],
        "wants": [{"want": "x", "pages": ["a/one", "a/none"]}],
        "studies": {"a": {"start": "a/one", "cost": "a/gone"}},
    }
    with pytest.raises(ValueError, match="names A7, a/none, a/gone, which the book does not have"):
        front._check(content, {"A1": row("A1", "holds")}, ["a/one"])


def test_the_front_page_of_this_book_names_what_is_there():
    content = yaml.safe_load((ROOT / "book" / "front.yaml").read_text(encoding="utf-8"))
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    keys = [file.removeprefix("notebooks/") for file in files]
    front._check(content, ledger.claims(), keys)
    assert content["studies"].keys() == set(ledger.studies())
    assert (
        len(content["contradictions"]) == 5
        and len(content["questions"]) == 4
        and len(content["wants"]) == 6
    )


def measured(tmp_path, monkeypatch, ours, load=0.2):
    """A measurement in which the whole model takes 30 ms, and these others in bf16."""
    monkeypatch.setattr(paths, "BENCH", tmp_path)
    whole = Timing(30.0, 29.0)
    rows = [
        Ratio("models", "x", "batch 16", "bf16", kind, "whole model", Timing(ms, ms), whole)
        for kind, ms in ours.items()
    ]
    machine = {"processor": "a chip", "threads": 2, "load_average": [load, 0.0]}
    file = speed.file_of("short")
    file.parent.mkdir(parents=True)
    speed.write(file, {"machine": machine}, rows)
    assert json.loads(file.read_text())["rows"]


def test_the_clock_says_what_is_fast_enough(tmp_path, monkeypatch):
    assert front.clock(1.5) != "" and "`make bench`" in absent(tmp_path, monkeypatch)
    measured(tmp_path / "a", monkeypatch, {"extracted": 25.0, "static model": 24.0})
    said = front.clock(1.5)
    assert "the mixture 1.20 in bf16 (batch 16); static model 1.25 in bf16" in said
    assert "(a chip, threads: 2). **Nothing here is 1.5 times as fast.**" in said
    assert "uncertain" not in said and "Nothing" not in front.clock(1.0)
    measured(tmp_path / "b", monkeypatch, {"extracted": 15.0, "static model": 24.0}, load=3.0)
    said = front.clock(1.5)
    assert "That reaches 1.5 times" in said and said.endswith("so these are uncertain.")


def absent(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BENCH", tmp_path / "none")
    return front.clock(1.5)
