"""The page of coverage: cells are counted from the store, states from the cells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib import paths
from lib.pages import coverage, profiles
from lib.runs import store
from lib.spec import RunSpec

PAPER = """
paper: {short: %s, title: A document}
items:
  - id: T1
    what: "Rows | columns."
    page: %s/one
    arms: [many, few*]
    differs: "Other data."
    lacks: "A column."
  - {id: F1, what: A drawing., page: %s/two}
  - {id: F2, what: Another., page: %s/two, runs: a/one, arms: [few, late]}
  - {id: F3, what: A third., lacks: No page draws it.}
"""
# arm: its runs, one a seed
PLAN = {
    "many": [RunSpec(seed=0), RunSpec(seed=1)],
    "few": [RunSpec(seed=2, device="cuda")],
    "few, long": [RunSpec(seed=3)],
    "late": [RunSpec(seed=4)],
}
# second seed of an arm, a run for a card on the CPU, a failed one
RECORDS = {PLAN["many"][1].id: "ok", PLAN["few"][0].on("cpu").id: "ok"}
RECORDS |= {PLAN["few, long"][0].id: "failed"}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Two documents, a plan of two pages and a store; the list is of the plans that were made."""
    monkeypatch.setattr(paths, "PAPERS", tmp_path)
    for study in "ab":
        (tmp_path / f"{study}.yaml").write_text(PAPER.replace("%s", study))
    (tmp_path / "c.yaml").write_text("paper: {title: Without a list}\n")
    made = []

    def plan(key, name):
        made.append((key, name))
        return PLAN

    def peek(run):
        return SimpleNamespace(status=RECORDS[run]) if run in RECORDS else None

    monkeypatch.setattr(profiles, "plan", plan)
    monkeypatch.setattr(store, "store", lambda: SimpleNamespace(peek=peek))
    return made


def test_a_cell_is_filled_by_one_finished_record_of_its_arm(planned):
    rows = coverage.covered("a")
    assert [(row.cells, row.filled) for row in rows] == [(3, 2), (0, 0), (2, 1), (0, 0)]
    assert [row.state for row in rows] == ["partly", "whole", "partly", "absent"]
    assert planned == [("a/one", "small")]  # once a page


def test_the_page_has_a_line_for_each_and_leads_to_it(planned):
    text = coverage.page(["b/one", "b/two", "a/one", "a/two"])
    lines = text.splitlines()
    assert lines[0] == "8 tables and figures: 2 **whole**, 4 **partly**, 2 **absent**."
    assert text.index("## b") < text.index("## a")  # as the book has them
    assert "*A document.* 4 tables and figures: 1 **whole**, 2 **partly**, 1 **absent**." in lines
    assert (
        "| {ref}`Table 1 <a-t1>`: Rows \\| columns. | partly, 2&nbsp;of&nbsp;3 | Other data. "
        "*Missing:* A column. |"
    ) in lines
    assert "| {ref}`Figure 1 <b-f1>`: A drawing. | whole |  |" in lines
    assert "| Figure 3: A third. | absent | *Missing:* No page draws it. |" in lines
