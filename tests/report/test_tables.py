"""Tables and sentences from synthetic records: sources apart, honest about n."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from factory import record

from lib.report import NOT_YET, tables, text
from lib.verdicts.claims import Verdict, judge, judge_jointly
from lib.verdicts.stats import Interval, accuracy_interval

THREE = [record(s) for s in range(3)]


def three():
    settings = pd.DataFrame({"E": [8, 8, 8], "L": [1, 2, 12], "shared": [False, True, True]})
    return tables.three_groups(
        settings,
        {
            "top-1 (%)": [
                91.5,
                tables.secondary(91.3, "a survey <2024>"),
                None,
            ]
        },
        {
            "top-1 (%)": [
                accuracy_interval(THREE),
                accuracy_interval(THREE[:1]),
                accuracy_interval([None]),
            ]
        },
        {"top-1 (%)": [60.04, None, None]},
        lambda row, group: True,
        caption="CIFAR-100 & top-1",
    )


def test_three_groups_cells():
    t = three()
    assert [c[0] for c in t.frame.columns] == ["setting"] * 3 + list(tables.GROUPS)
    published, reproduced, build = (t.frame[g, "top-1 (%)"].tolist() for g in tables.GROUPS)
    assert published == ["91.5", "91.3†", ""]
    assert re.fullmatch(r"\d\d\.\d \[\d\d\.\d, \d\d\.\d\], n=3", reproduced[0])
    assert re.fullmatch(r"\d\d\.\d, n=1", reproduced[1]) and reproduced[2] == "–"
    assert build == ["60.0", "–", "–"] and t.frame["setting", "shared"].tolist() == [
        "no",
        "yes",
        "yes",
    ]
    assert t.notes == (
        "Intervals: hierarchical bootstrap 95% over n seeds; none where n is below 3.",
        f"– {NOT_YET}",
        "† secondary: a survey <2024>",
    )


def in_sight_and_folded(table):
    """The texts of the rows that stand in sight, and of each fold below them, by its name."""

    def rows(part):
        return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in part.split("<tr>")[2:]]

    shown, *folds = table.body.split("<details><summary>")
    return rows(shown), {name: rows(part) for name, part in (f.split("</summary>") for f in folds)}


def test_rows_of_this_build_are_folded_below_the_others():
    frame = pd.DataFrame({"source": ["reproduced", "this build"], "model": ["a", "b"]})
    shown, folds = in_sight_and_folded(tables.table(frame, "Two."))
    assert shown == [["reproduced", "a"]] and folds == {"this build": [["this build", "b"]]}
    alone = tables.table(frame[1:], "One.").body
    assert alone.startswith("<details><summary>this build</summary>") and "b</td>" in alone
    assert "<details>" not in tables.table(frame[:1], "One.").body


def test_a_shortened_table_has_all_of_its_rows_folded():
    frame = pd.DataFrame({"model": list("abcd")})
    short = tables.table(frame, "Four.").shortened(0, 2, 9)  # there is no tenth row
    shown, folds = in_sight_and_folded(short)
    assert shown == [["a"], ["c"]] and folds == {"all 4 rows": [["a"], ["b"], ["c"], ["d"]]}
    # each part has its own rules of style
    assert len(set(re.findall(r'<table id="(\w+)"', short.body))) == 2
    whole = tables.table(frame, "Four.")
    assert whole.shortened().body == whole.shortened(0, 1, 2, 3).body == whole.body


def test_this_build_is_folded_apart_from_what_was_reproduced():
    shown, folded = three().body.split("<details><summary>this build</summary>")
    assert "reproduced" in shown and "published" in shown and "60.0" not in shown
    assert "60.0" in folded and "91.5" not in folded and folded.count(">12<") == 1


def test_a_setting_of_this_build_alone_has_no_row_among_the_others():
    settings = pd.DataFrame({"arm": ["both", "build"]})
    columns = {"a": [1.5, None]}, {"a": [2.5, None]}, {"a": [None, 3.5]}
    t = tables.three_groups(settings, *columns, lambda row, group: None)
    shown, folded = t.body.split("<details><summary>this build</summary>")
    assert ">both<" in shown and ">build<" not in shown
    assert ">both<" not in folded and ">build<" in folded and len(t.frame) == 2


@pytest.mark.parametrize(
    "cell, place",
    [
        ("+0.0 [-0.4, +0.5] doublings, n=3", "right"),
        ("57.2\n±1.1, n=3", "right"),
        ("1939 (sd 0)", "right"),
        ("+19.9 percent, counted", "right"),
        ("–¹", "right"),
        ("8 experts, 50% active", "left"),
        ("+ mean shift", "left"),
        ("1 of 2 parts holds; 1 opposite", "left"),
        ("3 → 1 → 0", "left"),
        ("", "left"),
    ],
)
def test_numbers_stand_to_the_right_and_texts_to_the_left(cell, place):
    look = tables._look(cell)
    assert f"text-align:{place}" in look and ("white-space:nowrap" in look) == (place == "right")


def test_table_html_scrolls_is_escaped_and_stable():
    text = three().html
    assert (
        "overflow-x:auto" in text
        and "CIFAR-100 &amp; top-1" in text
        and "survey &lt;2024&gt;" in text
    )
    assert 'colspan="3"' in text and 'scope="col"' in text and text == three().html
    assert f"<div>– {NOT_YET}</div>" in text and '<a href="../../status.html#' in NOT_YET
    other = tables.table(pd.DataFrame({"a": [1]}), "Another").html
    ids = [set(re.findall(r'id="(\w+)"', page)) for page in (text, other)]
    assert ids[0] and not ids[0] & ids[1]  # two tables of a page do not share style rules


def test_an_interval_stays_on_one_line_where_its_cell_is_broken():
    cells = ["-46.5 [-49.0, -44.1] points, n=5", "93.3 [92.5, 94.1], n=4", "as in [2024], 3 [a"]
    kept = re.findall('<span class="interval">(.*?)</span>', table_of(cells).html)
    assert kept == ["-46.5 [-49.0, -44.1]", "93.3 [92.5, 94.1],"]


def table_of(cells):
    return tables.table(pd.DataFrame({"a": cells}), "Cells")


def test_no_planned_run_stays_blank_and_missing_groups_are_empty_columns():
    t = tables.three_groups(
        pd.DataFrame({"L": [1, 2]}),
        {"a": [1.0, 2.0]},
        {},
        {"a": [None, 3.0]},
        lambda row, group: row == 1,
    )
    assert t.frame["reproduced", "a"].tolist() == ["", "–"] and t.frame[
        "this build", "a"
    ].tolist() == ["", "3.0"]


def test_the_header_of_what_was_reproduced_names_data_that_stand_in():
    cells = ({"a": [1.0]}, {"a": [2.0]}, {"a": [3.0]}, lambda *_: True)
    t = tables.three_groups(pd.DataFrame({"L": [1]}), *cells, reproduced_on="X, standing in for Y")
    groups = list(dict.fromkeys(t.frame.columns.get_level_values(0)))
    assert groups == ["setting", "published", "reproduced on X, standing in for Y", "this build"]
    shown, folded = t.body.split("<details>")
    assert "reproduced on X" in shown and "2.0" in shown and "3.0" in folded


def test_plain_table():
    settings = pd.DataFrame({"E": [8, None]})
    gap = tables.three_groups(settings, {"a": [1, 2]}, {}, {}, lambda *_: True)
    assert gap.frame["setting", "E"].tolist() == ["8", ""]
    assert tables.table(pd.DataFrame({"a": np.array([0.25], "float32")}), "c", 2).frame[
        "a"
    ].tolist() == ["0.25"]
    t = tables.table(
        pd.DataFrame({"cell": ["a", "b"], "ratio": [1.0, float("nan")], "n": [3, 4]}),
        "Ratios",
        decimals=2,
    )
    assert t.frame["ratio"].tolist() == ["1.00", ""] and t.frame["n"].tolist() == ["3", "4"]
    with pytest.raises(ValueError, match="caption"):
        tables.table(pd.DataFrame({"a": [1]}), " ")
    with pytest.raises(ValueError, match="2 cells for 1 rows"):
        tables.three_groups(pd.DataFrame({"L": [1]}), {"a": [1, 2]}, {}, {}, lambda *_: True)


# ---------------------------------------------------------------- sentences


def test_the_head_lists_the_claims_of_the_document_before_ours(monkeypatch):
    def verdict(id, kind, word):
        entry = SimpleNamespace(
            id=id,
            kind=kind,
            parts=(),
            part_of=None,
            headline=id == "X.head",
            size=None,
            published_size=None,
            unit="" if id == "X.bare" else "points",
            measured="share of the tokens, held against 0.5",
        )
        return Verdict(f"claim {id}", word, "+2", 3, entry=entry)

    monkeypatch.setattr(text, "HEAD", 2)
    ours = verdict("X.one", "ours", "holds")
    judged = [ours, verdict("X1", "document", "undecided"), verdict("X2", "document", "opposite")]
    assert bullets(text.answer(judged)) == [
        "- ⇄ *Opposite:* claim X2 (X2): +2.",
        "- ? *Undecided:* claim X1 (X1): +2.",
        "- *Further claims*, below: 1 (holds: 1).",
    ]
    first = bullets(text.answer([*judged, verdict("X.head", "ours", "holds")]))[0]
    assert first == "- ✔ *Holds:* claim X.head (X.head): +2."
    [bare] = bullets(text.answer([verdict("X.bare", "ours", "holds")]))
    assert bare.endswith("(X.bare): +2 (share of the tokens, held against 0.5).")


@pytest.mark.parametrize(
    "words, said",
    [
        (["holds", "holds, smaller than published"], "both parts hold"),
        (["holds"] * 3, "all 3 parts hold"),
        (["opposite", "opposite"], "0 of 2 parts hold; 2 opposite"),
        (
            ["holds", "not tested", "opposite", "not tested"],
            "1 of 4 parts holds; 1 opposite; 2 not tested",
        ),
    ],
)
def test_parts_of_a_claim_are_counted_by_verdict(words, said):
    # neither the statement of a part nor the mark of a pilot counts
    parts = [Verdict("It holds; and more", word, "", 3, pilot=True) for word in words]
    assert text.parts_held([part.verdict for part in parts]) == said
    joint = judge_jointly("all", parts)
    assert text.numbers(joint) == said
    data = text.answer([joint]).metadata["claims"]
    assert "parts" not in data[0] and json.dumps(data)


def part(name, mean, low, high, direction="greater", law_p=None):
    entry = SimpleNamespace(
        id=name, parts=(), size=1.0, published_size=None, unit="points", kind="document",
        part_of="X", headline=False, measured="",
    )  # fmt: skip
    interval = None if mean is None else Interval(mean, low, high, 3)
    return replace(judge(f"Claim {name}", interval, direction, 1.0), entry=entry, p=law_p)


def test_a_joint_claim_gives_the_interval_of_the_part_that_decides_it():
    sure, less_sure = (
        part("X.a", 2.7, 2.0, 3.4, law_p=0.001),
        part("X.b", 1.4, 0.9, 1.9, law_p=0.02),
    )
    both = judge_jointly("all", [sure, less_sure])
    assert text.numbers(both) == "both parts hold (X.b: +1.4 [+0.9, +1.9] points, n=3)"
    # a part that fails decides, however sure the others are; of two the one that fails more clearly
    failed, opposite = part("X.c", 0.1, -0.2, 0.4, law_p=0.3), part("X.d", -2, -3, -1, law_p=0.99)
    said = text.numbers(judge_jointly("all", [sure, failed, opposite]))
    assert said == (
        "1 of 3 parts holds; 1 not reproduced; 1 opposite (X.d: -2.0 [-3.0, -1.0] points, n=3)"
    )
    # the head says what that part is
    [line] = bullets(text.answer([judge_jointly("all", [sure, failed])]))
    assert line == (
        "- ✘ *Not reproduced:* all: 1 of 2 parts holds; 1 not reproduced "
        '(X.c "Claim X.c": +0.1 [-0.2, +0.4] points, n=3).'
    )


def test_a_part_without_a_number_decides_without_one():
    measured = part("X.a", 2.7, 2.0, 3.4)
    assert text.numbers(judge_jointly("all", [measured, part("X.b", None, None, None)])) == (
        "1 of 2 parts holds; 1 not tested"
    )
    single = part("X.b", 0.5, None, None)
    said = text.numbers(judge_jointly("all", [measured, single]))
    assert said == "1 of 2 parts holds; 1 undecided (X.b: +0.5 points, n=3)"


def test_a_box_is_markdown_inside_html():
    shown = text.boxed("One.", "Two.", sure="Three.", metadata={"a": 1})
    assert shown.data.split("\n\n") == [
        '<div class="answer">', "**Answer.** One. Two.", "**How sure.** Three.", "</div>"
    ]  # fmt: skip
    assert shown.metadata == {"a": 1} and "How sure" not in text.boxed("One.").data


def bullets(shown):
    return [line for line in shown.data.split("\n") if line.startswith("- ")]


def test_gaps_name_the_command():
    assert text.gaps({"a": [record(0), None]}).strip() == f"1 of 2 records is {NOT_YET}."
    assert text.gaps({"a": [None]}).strip() == f"1 record is {NOT_YET}."
    assert text.gaps({"a": [None] * 2}).strip() == f"2 of 2 records are {NOT_YET}."
    assert text.gaps({"a": [record(0)]}) == ""


def test_answer_sorts_the_claims_by_verdict(monkeypatch):
    monkeypatch.setattr(text, "HEAD", 4)
    judged = [
        Verdict("Reproduced: b", "undecided", "+3, n=1; no order", 1),
        Verdict("Reproduced: a", "holds", "+1 [0, 2]; all above 0", 3),
        Verdict("c", "not reproduced", "-1", 3, pilot=True),
        Verdict("d", "not tested", "", 0),
        Verdict("e", "undecided", "-2, n=1", 1),
    ]
    assert bullets(text.answer(judged)) == [
        "- ✔ *Holds:* a: +1 [0, 2].",
        "- ✘ *Not reproduced (pilot):* c: -1.",
        "- ? *Undecided:* b: +3, n=1. e: -2, n=1.",
        "- *Further claims*, below: 1 (not tested: 1).",
    ]
    assert "**How sure.** By chance." in text.answer(judged, sure="By chance.").data
    first = text.answer(judged).metadata["claims"][0]
    assert (first["claim"], first["verdict"], first["n"], first["id"]) == ("b", "undecided", 1, "")
    assert first["estimate"] is None and json.dumps(first)
    assert text.answer(judged, "In this model").metadata["source"] == "In this model"
    more = [*judged, *(Verdict(f"f{i}", "holds", "+2", 3) for i in range(3))]
    assert bullets(text.answer(more)) == [
        "- ✔ *Holds:* a: +1 [0, 2].",
        *(f"- ✔ *Holds:* f{i}: +2." for i in range(2)),
        "- ✘ *Not reproduced (pilot):* c: -1.",
        "- *Further claims*, below: 4 (holds: 1; undecided: 2; not tested: 1).",
    ]
    assert len(text.answer(more).metadata["claims"]) == 8
    untested = [Verdict("Reproduced: a", "not tested", "", 0)] * 2
    none = "**Answer.** None of this page's 2 claims has its records yet."
    assert none in text.answer(untested).data
