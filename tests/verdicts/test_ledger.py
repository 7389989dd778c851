"""The ledger: its entries, what is refused, and that the real one and the pages fit each other."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from lib import paths
from lib.pages import contents, parameters, profiles
from lib.report import text
from lib.verdicts import ledger
from lib.verdicts.claims import judge
from lib.verdicts.stats import Interval

ENTRY = """
  - id: A1
    statement: "More is better."
    source: Table 1
    direction: greater
    published: {table: scan, column: top1, of: {n: 8}, than: {n: 2}}
    page: a/one
    arms: [many, few]
"""
PRINTED = "published: {table: scan, column: top1, of: {n: 8}, than: {n: 2}}"
TABLE = """
tables:
  scan: {columns: [n, top1], rows: [[2, 50.0], [8, 53.5], [4, 51.0], [4, 52.0]]}
"""


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """A ledger of one's own: a function that writes the claims of a study."""
    monkeypatch.setattr(paths, "PAPERS", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)

    def write(text, study="a"):
        (tmp_path / f"{study}.yaml").write_text(f"{TABLE}claims:{text}")

    return write


def test_a_claim_has_its_size_from_the_printed_table(papers):
    papers(ENTRY)
    (claim,) = ledger.of_page("a/one")
    assert (claim.study, claim.size, claim.published_size) == ("a", 3.5, 3.5)
    assert claim.statistic == ledger.TOP1 and claim.unit == "points" and claim.decimals == 1
    assert claim.measured == ""
    load = claim.model_copy(update={"statistic": "largest load"})
    assert load.measured == "largest load"
    assert load.model_copy(update={"threshold": 0.5}).measured == "largest load, held against 0.5"
    assert claim.runs_page == "a/one" and ledger.on_runs_of("a/one") == [claim]
    assert ledger.of_page("a/two") == [] and list(ledger.claims()) == ["A1"]
    papers(
        ENTRY.replace("greater", "less").replace(
            "of: {n: 8}, than: {n: 2}", "of: {n: 2}, than: {n: 8}"
        )
    )
    assert ledger.claims()["A1"].size == 3.5  # above 0 in the claimed direction


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", "+3.5 points"),
        ("scan: {", "scan: {confidence: derived, ", "+3.5 points (derived)"),
        ("scan: {", "scan: {confidence: primary text, ", "+3.5 points"),
        (PRINTED, "smallest: 1", "no size printed; smallest that counts: 1 point"),
        (f"greater\n    {PRINTED}", "not worse\n    smallest: 1", "smallest that counts: 1 point"),
        (PRINTED, "kind: ours\n    smallest: 1", "smallest that counts: 1 point"),
        (
            PRINTED,
            "kind: ours\n    threshold: 0.5\n    smallest: 1",
            "held against 0.5; smallest that counts: 1 point",
        ),
    ],
)
def test_a_reader_is_told_where_a_size_comes_from(papers, old, new, said):
    papers(ENTRY)
    file = paths.PAPERS / "a.yaml"
    file.write_text(file.read_text().replace(old, new))
    assert text.published(ledger.claims()["A1"]) == said


@pytest.mark.parametrize("rows, count", [("{n: 9}", 0), ("{n: 4}", 2)])
def test_a_cell_must_be_one(papers, rows, count):
    papers(ENTRY.replace("of: {n: 8}", f"of: {rows}"))
    with pytest.raises(ValueError, match=f"{count} rows of scan"):
        ledger.claims()["A1"].size  # noqa: B018


def test_parts_have_what_they_share(papers):
    papers("""
  - id: A2
    statement: "All of it."
    source: Figure 2
    direction: joint
    page: a/two
    runs: a/one
    seeds: 5
    smallest: 0.05
    scale: nine images
    unit: nats
    parts:
      - {id: A2a, statement: "First.", direction: less, arms: [x]}
      - {id: A2b, statement: "Second.", direction: equal, arms: [y], smallest: 2, seeds: [3, 8]}
""")
    (whole,) = ledger.of_page("a/two")
    first, second = whole.judged()
    assert whole.size is None and (first.part_of, first.source) == ("A2", "Figure 2")
    assert (first.size, first.decimals, first.unit) == (0.05, 3, "nats")
    assert first.scale == second.scale == "nine images"
    assert second.size == 2 and second.planned_seeds == 8 and first.planned_seeds == 5
    assert ledger.judged_on("a/two") == [first, second] and ledger.judged_on("a/one") == []
    assert ledger.on_runs_of("a/one") == [first, second] and ledger.on_runs_of("a/two") == []
    assert list(ledger.claims()) == ["A2", "A2a", "A2b"]


def test_pilots(papers):
    papers(ENTRY)
    claim = ledger.claims()["A1"]
    assert claim.is_pilot(3) and claim.is_pilot(8)  # nobody has said yet how many
    staged = claim.model_copy(update={"seeds": (3, 8)})
    assert staged.is_pilot(3) and not staged.is_pilot(8) and staged.planned_seeds == 8
    assert not claim.model_copy(update={"seeds": 3}).is_pilot(3)
    # all were planned at once, and some are still to come
    at_once = claim.model_copy(update={"seeds": 8})
    assert at_once.is_pilot(3) and not at_once.is_pilot(8) and not at_once.is_pilot(9)


def test_what_is_not_tested_has_a_reason_and_nothing_else(papers):
    entry = "\n  - {id: A3, statement: s, source: t, reason: Not at this scale.%s}\n"
    papers(entry % "")
    assert list(ledger.claims()["A3"].judged()) == []
    papers(entry % ", page: a/one")
    with pytest.raises(ValueError, match="claim A3: .*an entry with a reason is not judged"):
        ledger.claims()


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("    page: a/one\n", "", "give `page` and `direction`, or the `reason`"),
        ("greater", "up", "direction: Input should be 'greater'"),
        ("greater", "joint", "`parts` go with direction joint"),
        ("published: {table: scan, column: top1, of: {n: 8}, than: {n: 2}}", "unit: points",
         "give the `published` size, or the `smallest`"),
        ("page: a/one", "page: a/one\n    seeds: [8, 3]", "give .pilot., .pilot, all. or a number"),
        ("page: a/one", "page: a/one\n    smallest: 1",
         "direction greater is judged by one size: give `published`"),
        ("greater", "less\n    smallest: 1", "direction less is judged by one size"),
        ("page: a/one", "page: a/one\n    smallest: 0", "smallest: Input should be greater than 0"),
        ("source:", "origin:", "source: Field required; origin: Extra inputs"),
    ],
)  # fmt: skip
def test_refused(papers, old, new, says):
    papers(ENTRY.replace(old, new))
    with pytest.raises(ValueError, match=f"data/papers/a.yaml, claim A1: .*{says}"):
        ledger.claims()


def test_an_id_is_there_once(papers):
    papers(ENTRY)
    papers(ENTRY, "b")
    with pytest.raises(ValueError, match="A1 is in the ledger twice: .*a.yaml and b.yaml"):
        ledger.claims()


def test_a_file_that_changes_is_read_again(papers):
    papers(ENTRY)
    assert ledger.claims()["A1"].statement == "More is better."
    papers(ENTRY.replace("More", "Much more"))
    assert ledger.claims()["A1"].statement == "Much more is better."


# ---- the real ledger

TOLD = [claim for claim in ledger.claims().values() if claim.reason is None]
STUDIES = {"vimoe": 16, "durham": 12, "leiden": 12, "moee": 6, "expert_pruning": 3}


def test_every_claim_of_the_documents_is_there():
    for study, count in STUDIES.items():
        letter = {"expert_pruning": "E"}.get(study, study[0].upper())
        claims = [c.id for c in ledger.of_study(study) if c.kind == "document"]
        assert claims == [f"{letter}{number}" for number in range(1, count + 1)]


def test_every_claim_is_judged_by_a_page_of_the_book():
    book = contents.in_book()
    assert {claim.page for claim in TOLD} <= set(book)
    for key in {claim.page for claim in TOLD}:
        cells = json.loads(parameters.source(key).read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert "page.answer(claims)" in code and re.search(r"page\.verdicts\(\s*claims", code), key
        assert ".verdicts.claims" not in code, f"{key} judges by itself"


def test_sizes_are_above_zero_and_arms_are_planned():
    planned = {key: profiles.plan(key, "small") for key in {c.runs_page for c in TOLD if c.arms}}
    for claim in TOLD:
        assert claim.parts or claim.size > 0, claim.id
        assert set(claim.arms) <= set(planned.get(claim.runs_page, {})), claim.id
        for arm in claim.arms:
            runs = planned[claim.runs_page][arm]
            assert (
                claim.parts
                or len(runs) in (1, claim.planned_seeds)
                or len(runs) > claim.planned_seeds
            ), f"{claim.id} plans {claim.planned_seeds} seeds, {arm!r} has {len(runs)} runs"


def test_a_gate_that_sends_all_classes_one_way_is_no_fifth_of_them():
    claim = ledger.claims()["D8b"]
    of_share = {100: (75.0, 83.0), 20: (-4.0, 2.0)}  # percent on one route, and less 21 at the ends
    said = {
        share: judge("", Interval(share - 21.0, *ends, 3), claim.direction, claim.size).verdict
        for share, ends in of_share.items()
    }
    assert said == {100: "not reproduced", 20: "holds"}


def test_pages_of_a_study_have_their_claims_in_its_file():
    for claim in TOLD:
        assert claim.page.split("/")[0] == claim.study, claim.id
        assert claim.runs_page.split("/")[0] == claim.study, claim.id


def test_the_yaml_holds_nothing_but_entries():
    for study in ledger.studies():
        content = yaml.safe_load((paths.PAPERS / f"{study}.yaml").read_text())
        assert len(content["claims"]) == len(ledger.of_study(study))
