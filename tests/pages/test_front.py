"""The front page: its answers follow from the verdicts, and it names nothing that is not there."""

from __future__ import annotations

import pytest
import yaml

from lib.pages import all_verdicts, front, front_numbers, order
from lib.paths import ROOT
from lib.report import text
from lib.verdicts import ledger


def row(name, verdict, after=True, **more):
    found = {"id": name, "statement": f"Claim {name}.", "part_of": None, "effect": 1.0}
    found |= {"unit": "points", "statistic": None, "records": [], "page": "a/one"}
    given = {"verdict": verdict, "after_correction": after, "reason": None, "text": "+1, n=3; all"}
    return found | given | more


@pytest.mark.parametrize(
    "words, said",
    [
        (["holds", "holds, smaller than published"], "*Counted:* 2 of 2 claims on it hold."),
        (["opposite", "not reproduced"], "*Counted:* 0 of 2 claims on it hold, 2 do not."),
        (["holds", "undecided", None], "*Counted:* 1 of 3 claims on it holds, 2 still open."),
        (["holds"], "*Counted:* 1 of 1 claim on it holds."),
        (["opposite"], "*Counted:* 0 of 1 claim on it holds, 1 does not."),
        (
            ["holds", "opposite", "undecided"],
            "*Counted:* 1 of 3 claims on it holds, 1 does not, 1 still open.",
        ),
        (["undecided", None], "*Open:* none of the claims on it is decided yet."),
    ],
)
def test_the_verdicts_of_a_question_are_counted_and_take_no_side(words, said):
    assert front.lead([row(f"A{i}", word) for i, word in enumerate(words)]) == said


def test_a_line_has_verdict_claim_number_and_link():
    rows = {"A1": row("A1", "holds", after=False), "A1a": row("A1a", None, part_of="A1")}
    link = '(<a href="verdicts.html#claim-A1">A1</a>)'
    assert front._bullet(rows["A1"], rows) == f"- (✔) *holds, alone*: Claim A1: +1, n=3 {link}"
    said = front._bullet(rows["A1a"] | {"effect": None, "text": None}, rows)
    assert said.startswith("- – *not judged yet*: Claim A1a (<a href=")
    assert said.endswith('; one part of "Claim A1.", which as a whole is: holds, alone)')


def test_the_claims_of_a_card_are_counted():
    words = ["holds", "opposite", "not reproduced", "undecided", None]
    rows = [row(f"A{i}", word) for i, word in enumerate(words)]
    assert front.standing(rows) == "1 of 5 claims holds, 2 do not, 2 open"
    assert front.standing(rows[1:3]) == "0 of 2 claims hold, 2 do not, 0 open"
    assert front.standing(rows[:2] * 2) == "2 of 4 claims hold, 2 do not, 0 open"
    assert front.standing(rows[1:2]) == "0 of 1 claim holds, 1 does not, 0 open"
    assert (
        front.standing([row("A1", "holds", after=False)]) == "0 of 1 claim holds, 0 do not, 1 open"
    )


def test_a_card_shows_the_figure_at_the_head_of_its_page(monkeypatch):
    image = '<figure><div><img class="dark-light" alt="A line" src="data:image/png;base64,QUI=" s>'
    of_figure = {
        "metadata": {"tags": ["headline-figure"]},
        "outputs": [
            {"data": {"text/html": ["<p>", image]}},
            {"data": {"text/html": "<img alt='x'>"}},
        ],
    }
    other = {"metadata": {}, "outputs": [{"data": {"text/html": image.replace("A line", "B")}}]}
    label = {"metadata": {"tags": ["headline-figure"]}, "source": "(label)="}
    pages = {"a/one": [other, label, of_figure], "a/none": [other]}
    monkeypatch.setattr(all_verdicts, "cells", pages.get)
    [shown, _] = front.picture("a/one")
    assert shown.startswith(
        '<div style="overflow-x:auto"><a href="notebooks/a/one.html#headline-figure">'
        '<img class="dark-light" alt="A line" '
        'src="data:image/png;base64,QUI="'
    )
    assert front.picture("a/none") == [] and order.HEADLINES[front.FIGURE] == "figure"


def test_cards_stand_below_each_other_so_that_figures_keep_the_width_of_the_text(monkeypatch):
    content = {"questions": [], "wants": [], "studies": {"leiden": {}}, "compared": "a/all"}
    monkeypatch.setattr(front, "_read", lambda keys: (content, {}))
    monkeypatch.setattr(front, "compared", lambda key: [])
    monkeypatch.setattr(front, "_card", lambda study, links, rows: [f"card of {study}"])
    lines = front.page(["leiden/tables"]).splitlines()
    assert "::::{grid} 1" in lines and "card of leiden" in lines


def test_a_card_may_show_the_figure_of_another_page(monkeypatch):
    monkeypatch.setattr(front, "picture", lambda key: [f"figure of {key}"])
    monkeypatch.setattr(front.answers, "of_rows", lambda key, rows: f"answer of {key}")
    links = {"start": "leiden/tables", "cost": "leiden/tables"}
    card = front._card("leiden", links, [])
    assert card.index("answer of leiden/tables") < card.index("figure of leiden/tables")
    assert "figure of a/wide" in front._card("leiden", links | {"figure": "a/wide"}, [])
    studies = {"leiden": links | {"figure": "a/gone"}}
    content = {"questions": [], "wants": [], "studies": studies, "compared": "leiden/tables"}
    with pytest.raises(ValueError, match="names a/gone, which the book does not have"):
        front._check(content, {}, ["leiden/tables"])


def test_all_methods_are_shown_with_the_answer_of_their_page(monkeypatch):
    boxed = text.boxed("Dense is best: 80.1.", "None beats it.", sure="3 seeds.").data
    cells = [
        {"metadata": {}, "outputs": [{"data": {"text/markdown": "no answer"}}]},
        {"metadata": {}, "outputs": [{"data": {"text/markdown": boxed}}]},
    ]
    monkeypatch.setattr(all_verdicts, "cells", lambda key: cells)
    assert front.compared("a/all") == []  # no figure yet
    monkeypatch.setattr(front, "picture", lambda key, narrowest: [f"figure of {key}", ""])
    assert front.compared("a/all") == [
        "## All methods side by side",
        "",
        "Dense is best: 80.1. None beats it. More: [](notebooks/a/all.ipynb).",
        "",
        "figure of a/all",
        "",
    ]


def test_what_the_book_has_not_is_named():
    content = {
        "questions": [{"ask": "?", "claims": ["A1", "A7"], "says": {"A8": {}}}],
        "wants": [{"want": "x", "pages": ["a/one", "a/none"], "measured": [{"page": "c/gone"}]}],
        "studies": {"a": {"start": "a/one", "cost": "a/gone"}},
        "compared": "b/gone",
    }
    with pytest.raises(
        ValueError,
        match="names A7, A8, a/none, a/gone, b/gone, c/gone, which the book does not have",
    ):
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


@pytest.mark.parametrize(
    "fastest, accuracy, answer",
    [
        (1.6, "holds", "**Yes, as measured here.**"),
        (1.4, "holds", "**Nothing measured here does that.**"),
        (1.6, "fails", "**Nothing measured here does that.**"),
        (None, "fails", "**Nothing measured here does that.**"),
        (None, "holds", "**Not known yet.**"),
        (1.6, "open", "**Not known yet.**"),
    ],
)
def test_a_speed_counts_only_where_accuracy_is_kept(fastest, accuracy, answer):
    assert front.enough(fastest, 1.5, accuracy) == answer


def test_a_claim_that_holds_alone_is_open():
    alone, stands = row("A1", "holds", after=False), row("A2", "holds, smaller than published")
    assert front.lead([alone, stands]) == ("*Counted:* 1 of 2 claims on it holds, 1 still open.")
    says = {"A1": {"holds": "Yes.", "open": "Perhaps."}, "A2": {"holds": "Surely."}}
    assert front.said({"says": says}, {"A1": alone, "A2": stands}) == ["Perhaps.", "Surely."]


def test_a_number_without_a_unit_says_of_what_it_is():
    bare = row("A1", "holds", unit="", statistic="largest load over the mean, less one")
    assert ": +1, n=3 (largest load over the mean, less one) (" in front._bullet(bare, {})
    assert ": +1, n=3 (<a" in front._bullet(row("A2", "holds", statistic="of no matter"), {})


def test_the_sentence_of_an_answer_follows_the_verdict():
    words = {"holds": "Yes ({ours}).", "fails": "No ({ours})."}
    asked = {"says": {"A1": words, "A2": words, "A3": words, "A4": words | {"open": "Perhaps."}}}
    verdicts = {"A1": "holds, smaller than published", "A2": "opposite", "A3": None, "A4": None}
    rows = {name: row(name, word) for name, word in verdicts.items()}
    assert front.said(asked, rows) == ["Yes (+1, n=3).", "No (+1, n=3).", "Perhaps."]
    assert front.said({}, rows) == []


def test_a_sentence_may_name_its_data(monkeypatch):
    monkeypatch.setattr(front.datasets, "shown", lambda row, parts: ["digits", "letters"])
    asked = {"says": {"A1": {"holds": "Better on {on} ({ours})."}}}
    assert front.said(asked, {"A1": row("A1", "holds")}) == ["Better on digits; letters (+1, n=3)."]


def test_what_is_opposite_or_holds_alone_has_a_sentence_of_its_own():
    words = {"holds": "Better.", "fails": "No better.", "open": "Perhaps better."}
    special = words | {"opposite": "Worse ({ours}).", "alone": "Better by itself ({ours})."}
    opposite, alone = row("A1", "opposite"), row("A2", "holds", after=False)
    asked = {"says": {"A1": special, "A2": special}}
    assert front.said(asked, {"A1": opposite, "A2": alone}) == [
        "Worse (+1, n=3).",
        "Better by itself (+1, n=3).",
    ]
    assert front.said(asked, {"A1": row("A1", "not reproduced"), "A2": row("A2", "holds")}) == [
        "No better.",
        "Better.",
    ]
    undecided = {"A1": row("A1", "undecided"), "A2": row("A2", "undecided")}
    assert front.said(asked, undecided) == ["Perhaps better."] * 2
    assert front.said({"says": {"A1": words, "A2": words}}, {"A1": opposite, "A2": alone}) == [
        "No better.",
        "Perhaps better.",
    ]


def test_a_want_is_answered_before_its_claims(monkeypatch):
    clock = {"the mixture": 1.2, "a pruner": 1.6}, "Fewer multiply-adds.", "Times."
    monkeypatch.setattr(front_numbers, "clock", lambda: clock)
    monkeypatch.setattr(front_numbers, "nearest", lambda key, within: f"{key} at {within}.")
    monkeypatch.setattr(front_numbers, "measured", lambda sentence: sentence["text"])
    want = {"want": "Faster?", "pages": ["a/one"], "claims": ["A1"], "speed_up": 1.5, "within": 80}
    want |= {"says": {"A1": {"fails": "It loses ({ours})."}}, "text": "Try it."}
    lines = front._want(want, {"A1": row("A1", "opposite")}, "a/all")
    assert lines[0] == "**Faster?**"
    assert lines[2:10] == [
        "- **Nothing measured here does that.**",
        "- It loses (+1, n=3).",
        "- With half of the MLPs' neurons active, times as fast as the whole model at best on the "
        "clock: the mixture 1.20 and a pruner 1.60 (ViT-S at 224 px, see below).",
        "- Fewer multiply-adds.",
        "- a/all at 80.",
        "- Try it.",
        "- More: [](notebooks/a/one.ipynb).",
        "",
    ]
    assert lines[10] == "<details><summary>1 claim behind this</summary>" and "A1" in lines[12]
    on_clock = {"want": "How fast?", "pages": ["a/one"], "speed_up": 1.0}
    told = front._want(on_clock | {"measured": [{"text": "Look."}, {"text": ""}]}, {}, "")
    more = "- More: [](notebooks/a/one.ipynb)."
    assert told[2:] == ["- Look.", "- Times.", "- Fewer multiply-adds.", more, ""]
