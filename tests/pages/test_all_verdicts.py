"""All verdicts: the ledger beside what pages said, corrected for the number of claims of a study,
the sentences on the state, and the second stage of seeds."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from lib import paths
from lib.pages import all_verdicts, datasets, manifest, stages
from lib.verdicts import ledger

CLAIM = """
  - id: %s
    statement: "Claim %s."
    source: Table 1
    direction: greater
    published: 2.0
    page: a/one
    arms: [more, less]
"""
JOINT = """
  - id: A9
    statement: "Both."
    source: Figure 1
    kind: ours
    direction: joint
    page: a/one
    smallest: 1
    parts:
      - id: A9a
        statement: "First."
        statistic: "the load < 2"
        direction: greater
        arms: [x]
      - id: A9b
        statement: "Second."
        direction: equal
        arms: [y]
  - {id: A10, statement: "Too large.", source: Table 9, reason: "Not at this scale."}
"""


def said(name, p, verdict="holds", mean=1.0, pilot=False, n=3):
    """What a page's answer says of a claim, as data."""
    law = {"mean": mean, "image_variance": 0.0, "seed_variance": 0.03, "degrees": 2.0}
    estimate = {"mean": mean, "low": mean - 1, "high": mean + 1, "method": "t 95%", "law": law}
    text, records = f"{mean:+.1f}; and more", [f"run of {name}", "shared run"]
    numbers = {"id": name, "verdict": verdict, "p": p, "n": n, "pilot": pilot}
    return numbers | {"text": text, "records": records, "estimate": estimate}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A ledger, and a function that makes the executed page say something of its claims."""
    monkeypatch.setattr(paths, "PAPERS", tmp_path / "data" / "papers")
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    monkeypatch.setattr(all_verdicts, "ROOT", tmp_path)
    paths.PAPERS.mkdir(parents=True)
    text = "paper: {short: Doc, title: A document}\nclaims:" + "".join(
        CLAIM.replace("%s", f"A{i}") for i in "1234"
    ).replace("source: Table 1", "source: Table 1\n    headline: true", 1)
    (paths.PAPERS / "a.yaml").write_text(text + JOINT)

    def page(*claims):
        data = {"source": "Reproduced", "claims": list(claims)}
        output = {"data": {}, "metadata": {"text/markdown": data}}
        path = manifest.executed("a/one")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": [output]}]}))
        return {row["id"]: row for row in all_verdicts.rows(["a/one", "a/unbuilt"])}

    return page


def test_claims_hold_after_the_correction_of_their_study(book):
    """Three with a p-value and one counted: 11/6 times 3 / rank times p, against 2.5%."""
    rows = book(
        said("A1", 0.001), said("A2", 0.012), said("A3", 0.9, "undecided"), said("A4", None, n=1)
    )
    after = {name: row["after_correction"] for name, row in rows.items()}
    assert after == {
        "A1": True, "A2": False, "A3": None, "A4": True, "A9": None, "A9a": None, "A9b": None,
        "A10": None,
    }  # fmt: skip
    decided = [name for name, row in rows.items() if all_verdicts.decided(row)]
    assert decided == ["A1", "A4"]
    assert rows["A10"]["reason"] and rows["A10"]["verdict"] is None
    assert rows["A1"]["published"] == 2.0 and rows["A1"]["effect"] == 1.0
    assert rows["A1"]["records"] == ["run of A1", "shared run"]


def test_what_is_opposite_alone_is_not_reproduced_at_least(book):
    """Of three claims with a direction: 11/6 times 3 times 1 - p, against 2.5%."""
    for p, after in ((0.999, True), (0.988, False)):
        rows = book(said("A1", p, "opposite"), said("A2", 0.3, "undecided"), said("A3", 0.5))
        assert rows["A1"]["after_correction"] is after is all_verdicts.stands(rows["A1"])
        assert all_verdicts.decided(rows["A1"])
        assert (rows["A2"]["after_correction"], rows["A3"]["after_correction"]) == (None, False)


def test_a_joint_claim_holds_after_it_where_its_parts_do(book):
    parts = [said("A9a", 0.001), said("A9b", 0.001)]
    rows = book(said("A9", None), *parts)
    assert rows["A9"]["after_correction"] is True and rows["A9a"]["part_of"] == "A9"
    rows = book(said("A9", None), parts[0], said("A9b", 0.02))
    assert rows["A9"]["after_correction"] is False
    rows = book(said("A9", None, "undecided"), parts[0], said("A9b", 0.3, "undecided"))
    assert rows["A9"]["after_correction"] is None


def test_sentences_on_the_state_are_counted(book):
    rows = book(said("A1", 0.001), said("A2", 0.012), said("A3", 0.999, "opposite"))
    state = all_verdicts.state_of(list(rows.values()))
    assert "The documents make 5 claims. 4 can be tested here and 2 of these are decided," in state
    assert "0 of them with seeds still to come" in state
    assert "1 *holds*; 1 *holds, alone*; 1 *opposite*; 1 *not judged yet*." in state
    assert (
        "1 control of this book stands beside them." in state and "are 4 records of runs." in state
    )


def test_the_page_shows_published_beside_ours(book, monkeypatch):
    monkeypatch.setattr(datasets, "stand_ins", lambda study: {"pictures": "photos & more"})
    monkeypatch.setattr(datasets, "_data_of", {"run of A1": "pictures", "run of A9a": "x"}.get)
    parts = [said("A9a", 0.001), said("A9b", 0.3, "undecided")]
    joint = said("A9", None, "undecided") | {"decisive": "A9b"}
    book(said("A1", 0.001, pilot=True), said("A2", 0.012), joint, *parts)
    tables = Tables.of(all_verdicts.page(["a/one"]))
    headlines, others = tables.rows["A1"], tables.rows["A2"]
    assert tables.table_of["A1"] != tables.table_of["A2"] == tables.table_of["A9"]
    link = "notebooks/a/one.html#verdicts"
    assert link in tables.links and tables.folded == {"a"}
    assert headlines["Claim"].startswith("Doc A1 Claim A1. (Table 1; a/one )")
    assert "Records in data/results : run of A1 , shared run" in headlines["Claim"]
    shown = {name: headlines[name] for name in ("Paper", "Ours", "Verdict", "Seeds", "Data")}
    assert shown == {
        "Paper": "+2.0 points", "Ours": "+1.0", "Verdict": "✔ holds", "Seeds": "3, pilot",
        "Data": "pictures, standing in for photos & more",
    }  # fmt: skip
    assert others["Verdict"] == "(✔) holds, alone" and others["Data"] == ""
    joint = tables.rows["A9"]
    assert joint["Paper"] == "A9b: smallest that counts: 1 point"
    assert joint["Ours"] == "A9b: +1.0"
    assert joint["Verdict"] == "? undecided"
    assert "A9b Second. smallest that counts: 1 point +1.0 3 seeds ? undecided" in joint["Claim"]
    assert "A9a First. Measured: the load < 2. smallest that counts:" in joint["Claim"]
    assert "Not at this scale." in tables.rows["A10"]["Claim"]
    assert tables.rows["A10"]["Verdict"] == "– not tested"
    assert tables.rows["A3"]["Verdict"] == "– not judged yet"


def test_a_joint_claim_has_verdict_and_seeds_of_the_part_whose_number_it_shows(book):
    parts = [said("A9a", 0.999, "opposite", n=5), said("A9b", 0.3, "undecided", n=1, pilot=True)]
    joint = said("A9", None, "not reproduced", n=1, pilot=True) | {"decisive": "A9a"}
    book(joint, *parts)
    page = all_verdicts.page(["a/one"])
    row = Tables.of(page).rows["A9"]
    assert row["Ours"] == "A9a: +1.0" and row["Seeds"] == "5; pilot in other parts"
    assert row["Verdict"] == "✘ not reproduced A9a: ⇄ opposite"
    assert 'data-verdict="not reproduced; opposite"' in page
    assert "+1.0 5 seeds ⇄ opposite" in row["Claim"]
    assert "+1.0 1 of 3 seeds, pilot ? undecided" in row["Claim"]
    book(joint | {"verdict": "undecided", "decisive": "A9b"}, *parts)
    row = Tables.of(all_verdicts.page(["a/one"])).rows["A9"]
    assert (row["Verdict"], row["Seeds"]) == ("? undecided", "1 of 3, pilot")
    untested = {"verdict": "not tested", "n": 0, "decisive": None}
    book(joint | untested, parts[1])
    row = Tables.of(all_verdicts.page(["a/one"])).rows["A9"]
    assert row["Ours"] == "0 of 2 parts hold; 1 undecided; 1 not tested"
    assert row["Seeds"] == "pilot in some parts"
    # a seed is explained where it is no model of its own, and only there
    assert "<caption>" not in page
    file = paths.PAPERS / "a.yaml"
    file.write_text(file.read_text().replace("short: Doc", "short: Doc, seeds: A seed is a draw."))
    page = all_verdicts.page(["a/one"])
    assert page.count("<caption>A seed is a draw.</caption>") == Tables.of(page).tables == 2


def test_effects_without_chance_or_without_records_say_so(book):
    counted = said("A1", None, n=1)
    counted["estimate"] |= {"method": "exact"}
    book(counted, said("A2", 0.001, n=20) | {"records": []})
    rows = Tables.of(all_verdicts.page(["a/one"])).rows
    assert rows["A1"]["Seeds"] == "no seeds"
    assert rows["A2"]["Seeds"] == "20" and rows["A2"]["Data"] == "simulated, no real images"
    assert rows["A3"]["Data"] == "" and "Seeds" not in rows["A3"]


class Tables(HTMLParser):
    """Reads the text of each claim's cells by the names of the columns."""

    def __init__(self):
        super().__init__()
        self.rows, self.table_of, self.links, self.folded = {}, {}, set(), set()
        self.row, self.cell, self.tables = None, None, 0

    @classmethod
    def of(cls, page):
        tables = cls()
        tables.feed(page)
        tables.close()
        return tables

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "table" and attrs["class"] == "verdicts":
            self.tables += 1
        if tag == "tr" and attrs.get("class") == "claim":
            self.row = {}
        if self.row is not None and tag == "th":
            self.cell = self.cell or "Claim"
        if attrs.get("data-name"):
            self.cell = attrs["data-name"]
        self.links |= {attrs["href"]} if tag == "a" else set()
        self.folded |= (
            {attrs["id"]} if attrs.get("class") == "study" and tag == "details" else set()
        )

    def handle_data(self, data):
        if self.row is not None and self.cell:
            self.row[self.cell] = " ".join(f"{self.row.get(self.cell, '')} {data}".split())
            self.row.setdefault("Data", "")

    def handle_endtag(self, tag):
        if tag == "tr" and self.row is not None and "Verdict" in self.row:
            name = self.row["Claim"].split()[1]
            self.rows[name], self.table_of[name] = self.row, self.tables
            self.row = self.cell = None


def test_the_json_is_what_the_pages_said(book):
    book(said("A1", 0.001))
    rows = json.loads(all_verdicts.as_json(["a/one"]))
    assert rows == all_verdicts.rows(["a/one"])
    assert all_verdicts.settled() == {}
    with pytest.raises(FileNotFoundError, match="`make book` writes it"):
        all_verdicts.read()
    (paths.PAPERS.parents[1] / "book" / "claims.json").write_text(json.dumps(rows))
    assert all_verdicts.read() == rows
    assert all_verdicts.settled() == {"A1": True}
    overview = all_verdicts.overview(rows)
    assert overview.startswith("State of the claims.") and "\nA1 " not in overview
    assert "A2         not judged yet                       n=0 of 3     a/one" in overview


def test_a_claim_with_seeds_to_come_is_not_settled(book):
    def settled(*claims):
        rows = list(book(*claims).values())
        (paths.PAPERS.parents[1] / "book" / "claims.json").write_text(json.dumps(rows))
        return all_verdicts.settled()

    alone = said("A1", 0.001), said("A2", 0.9, "opposite", pilot=True), said("A3", 0.3, "undecided")
    assert settled(*alone) == {"A1": True, "A2": False}
    # one part decides a joint claim; the other is settled with it where it has all its seeds
    fails, waits = said("A9a", 0.9, "opposite"), said("A9b", 0.3, "undecided", pilot=True)
    both = {
        word: settled(said("A9", None, "opposite", pilot=other.get("pilot")), fails, other)
        for word, other in {
            "whole": waits | {"pilot": False},
            "waits": waits,
            "not tested": {"id": "A9b", "verdict": "not tested", "pilot": False},
        }.items()
    }
    assert both == {
        "whole": {"A9": True, "A9a": True, "A9b": True},
        "waits": {"A9": False, "A9a": True, "A9b": False},
        "not tested": {"A9": True, "A9a": True, "A9b": False},
    }
    # the page says nothing of it yet
    assert settled(said("A9", None, "opposite"), fails)["A9b"] is False
    # a joint claim that is open settles nothing; a part that holds alone does itself
    undecided = said("A9", None, "undecided", pilot=True)
    assert settled(undecided, said("A9a", 0.001), waits) == {"A9a": True}


def test_the_readme_has_the_state_between_its_marks(book):
    rows = list(book(said("A1", 0.001)).values())
    readme = paths.PAPERS.parents[1] / "README.md"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        all_verdicts.write_readme(rows, [])
    marks = f"{all_verdicts.START}\nof last year\n{all_verdicts.END}"
    readme.write_text(f"# Title\n\n{marks}\n\nRest.\n")
    all_verdicts.write_readme(rows, [])
    once = readme.read_text()
    assert once.startswith("# Title\n\n") and once.endswith(f"{all_verdicts.END}\n\nRest.\n")
    assert "The documents make 5 claims" in once and "last year" not in once
    all_verdicts.write_readme(rows, [])
    assert readme.read_text() == once
    all_verdicts.write_readme(rows, ["- One. Yes.", f"- Two. {'No ' * 50}."])
    assert f"{all_verdicts.START}\n- One. Yes.\n- Two. No No " in (lines := readme.read_text())
    assert "\n  No No" in lines and "No .\n\n**State of the claims.**" in lines


# ---- the second stage


def test_the_second_stage_is_written_once(book):
    """Half of 4.302653 * 0.3 / sqrt(n) is at most 1 at once, and at most 0.5 from n = 7."""
    rows = book(said("A1", 0.001), said("A2", 0.2, n=2), said("A9a", 0.5), said("A9", None))
    before = (paths.PAPERS / "a.yaml").read_text()
    assert stages.fix(rows.values()) == {"A1": 3, "A9a": 7}
    after = (paths.PAPERS / "a.yaml").read_text()
    entries = ledger.claims()
    assert entries["A1"].seeds == (3, 3) and entries["A9a"].seeds == (3, 7)
    assert entries["A2"].seeds == entries["A9b"].seeds == (3,)
    new = [line for line in after.splitlines() if line not in before.splitlines()]
    assert new == ["    seeds: [3, 3]", "        seeds: [3, 7]"]
    assert stages.fix(book(said("A1", 0.9, mean=9.0)).values()) == {}  # never again


def test_a_stage_replaces_the_pilot_of_its_own_entry():
    text = "claims:\n  - id: A1\n    seeds: [3]\n    parts:\n      - id: A1a\n        seeds: [3]\n"
    text += "  - id: A2  # a comment\n"
    assert stages.with_stage(text, "A1", [3, 8]) == text.replace("[3]", "[3, 8]", 1)
    part = stages.with_stage(text, "A1a", [3, 8])
    assert part == text.replace("        seeds: [3]", "        seeds: [3, 8]")
    assert stages.with_stage(text, "A2", [3, 4]) == text + "    seeds: [3, 4]\n"
    with pytest.raises(ValueError, match="0 entries have the line '- id: A3'"):
        stages.with_stage(text, "A3", [3, 4])
