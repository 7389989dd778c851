"""A page answers its title in sentences that follow from the verdicts on its claims."""

from types import SimpleNamespace

import pytest

from lib.pages import answers, front, parameters
from lib.paths import ROOT
from lib.report import text
from lib.verdicts import ledger, papers
from lib.verdicts.claims import Verdict, judge, judge_jointly
from lib.verdicts.stats import Interval

WORDS = {"holds": "Yes ({ours}).", "fails": "No ({ours}).", "open": "Perhaps ({ours})."}
OUTCOMES = {"holds", "fails", "open"}


def verdict(id, mean, low, high, size=1.0, part_of=None, printed=None):
    entry = SimpleNamespace(
        id=id, kind="ours", parts=(), part_of=part_of, headline=False, size=size, unit="points",
        published_size=printed, smallest=None, is_derived=False, direction="greater", decimals=1,
        statistic="", statement=f"Claim {id}.",
    )  # fmt: skip
    interval = None if mean is None else Interval(mean, low, high, 3)
    judged = judge(f"Claim {id}.", interval, "greater", size)
    return Verdict(**{**vars(judged), "entry": entry})


@pytest.fixture
def asked(monkeypatch):
    """Lets a page a/one be answered by the claims that a test names."""

    def ask(**of_claims):
        monkeypatch.setattr(papers, "names", lambda: ["a"])
        monkeypatch.setattr(papers, "load", lambda name: {"answers": {"a/one": of_claims}})

    return ask


@pytest.mark.parametrize(
    "interval, said",
    [
        ((2.0, 1.0, 3.0), "Yes (X1, *holds*: +2.0 [+1.0, +3.0] points, n=3)."),
        ((0.1, -0.5, 0.7), "No (X1, *not reproduced*: +0.1 [-0.5, +0.7] points, n=3)."),
        ((-2.0, -3.0, -1.0), "No (X1, *opposite*: -2.0 [-3.0, -1.0] points, n=3)."),
        ((1.0, -1.0, 3.0), "Perhaps (X1, *undecided*: +1.0 [-1.0, +3.0] points, n=3)."),
    ],
)
def test_the_sentence_follows_the_verdict_and_has_its_numbers(asked, interval, said):
    asked(X1=WORDS)
    assert answers.of_page("a/one", [verdict("X1", *interval)], lambda v: "") == ([said], {"X1"})


def test_what_is_opposite_may_have_a_sentence_of_its_own(asked):
    asked(X1=WORDS | {"opposite": "Worse."})
    judged = [verdict("X1", -2.0, -3.0, -1.0)]
    assert answers.of_page("a/one", judged, lambda v: "")[0] == ["Worse."]


def test_a_claim_without_records_is_answered_by_nothing(asked):
    asked(X1=WORDS)
    judged = [verdict("X1", None, None, None)]
    assert answers.of_page("a/one", judged, lambda v: "") == ([], set())
    assert answers.of_page("a/other", judged, lambda v: "") == ([], set())
    assert answers.of_page("b/one", judged, lambda v: "") == ([], set())


def test_a_joint_claim_is_answered_with_the_part_that_decides_it(asked):
    parts = [
        verdict("X1a", 2.0, 1.0, 3.0, part_of="X1"),
        verdict("X1b", 0.1, -0.5, 0.7, part_of="X1", printed=1.0),
    ]
    joint = judge_jointly("Both.", parts)
    joint = Verdict(**{**vars(joint), "entry": SimpleNamespace(id="X1", part_of=None)})
    asked(X1=WORDS)
    said, spoken_of = answers.of_page("a/one", [joint, *parts], lambda v: "")
    numbers = "paper +1.0 points, ours +0.1 [-0.5, +0.7] points, n=3"
    assert said == [f'No (X1b "Claim X1b", *not reproduced*: {numbers}).']
    assert spoken_of == {"X1", "X1b"}
    # a joint claim is listed still, unless the part that decides it is spoken of
    asked(X1a=WORDS)
    assert answers.of_page("a/one", [joint, *parts], lambda v: "")[1] == {"X1a"}
    asked(X1b=WORDS)
    said, spoken_of = answers.of_page("a/one", [joint, *parts], lambda v: "")
    assert said == [f"No (X1b, *not reproduced*: {numbers})."] and spoken_of == {"X1", "X1b"}


def test_data_that_stand_in_are_named_once(asked):
    asked(X1=WORDS, X2=WORDS, X3=WORDS)
    judged = [verdict(name, 2.0, 1.0, 3.0) for name in ("X1", "X2", "X3")]
    on = {"X1": "digits for birds", "X2": "digits for birds", "X3": "tiles for fish"}
    said, _ = answers.of_page("a/one", judged, lambda v: on[v.id])
    assert [sentence.partition("n=3")[2] for sentence in said] == [
        ", on digits for birds).", ").", ", on tiles for fish)."
    ]  # fmt: skip


def test_a_claim_of_another_page_is_refused(asked):
    asked(X2=WORDS)
    with pytest.raises(ValueError, match=r"data/papers/a\.yaml answers a/one by claim X2.* X1"):
        answers.of_page("a/one", [verdict("X1", 2.0, 1.0, 3.0)], lambda v: "")


def test_the_box_begins_with_the_answer_and_lists_other_claims():
    judged = [verdict(name, 2.0, 1.0, 3.0) for name in ("X1", "X2", "X3", "X4")]
    for said, listed in ((["Yes."], ["2", "3"]), (["Yes.", "Surely."], ["2"]), (["Yes."] * 4, [])):
        box = text.answer(judged, said=said, spoken_of={"X1"}).data
        assert f"**Answer.** {' '.join(said)}" in box
        lines = [line for line in box.split("\n") if line.startswith("- ")]
        assert [line.partition(" (X")[2][:1] for line in lines] == [*listed, ""]
        more = 3 - len(listed)
        assert lines[-1] == f"- *Further claims*, below: {more} (holds: {more})."
    assert len(text.answer(judged, said=["Yes."]).metadata["claims"]) == 4
    # sentences alone are an answer, too
    untested = [verdict("X1", None, None, None)]
    assert "has no records yet" in text.answer(untested).data
    assert "records yet" not in (box := text.answer(untested, said=["Yes."]).data) and "Yes." in box


@pytest.fixture
def listed(monkeypatch):
    """Two claims of a page as rows of all verdicts: one holds alone, one fails by its part."""
    row = {
        "part_of": None,
        "pilot": False,
        "decisive": None,
        "after_correction": None,
        "effect": 1.0,
        "reason": None,
    }
    texts = {"X1": "+2, n=3; all", "X2": "X2a not reproduced", "X2a": "+0.1, n=3; some"}
    rows = [
        row | {"id": id, "text": text, "verdict": "not reproduced"} for id, text in texts.items()
    ]
    rows[0] |= {"verdict": "holds", "after_correction": False}
    rows[1] |= {"decisive": "X2a", "effect": None}
    rows[2] |= {"pilot": True}
    sizes = {"size": None, "published_size": None}
    entries = {id: SimpleNamespace(id=id, statement=f"Claim {id}.", **sizes) for id in texts}
    monkeypatch.setattr(ledger, "claims", lambda: entries)
    monkeypatch.setattr(answers, "title", lambda key: "Does it?")
    monkeypatch.setattr(answers.datasets, "shown", lambda row, parts: ["digits"])
    return rows


def test_rows_of_all_verdicts_answer_with_the_correction(asked, listed):
    asked(X1=WORDS, X2=WORDS)
    first = "X1, *holds, alone*: +2, n=3, on digits"
    second = 'X2a "Claim X2a", *not reproduced (pilot)*: +0.1, n=3'
    said = answers.of_rows("a/one", listed)
    assert said == f"*Does it?* Perhaps ({first}). No ({second})."
    asked(X1=WORDS | {"alone": "Yes, alone."})
    assert answers.of_rows("a/one", listed) == "*Does it?* Yes, alone."
    listed[0]["effect"] = None
    assert answers.of_rows("a/one", listed) == "*Does it?* No records yet."


def test_the_title_is_that_of_the_notebook():
    assert answers.title("leiden/tables") == "Does a mixture survive pruning better?"


def test_each_study_is_answered_in_a_line(monkeypatch):
    monkeypatch.setattr(answers, "of_rows", lambda key, listed: f"*{key}*")
    lines = front.in_short([])
    assert "- Leiden. *leiden/tables*" in lines and len(lines) == len(papers.names())


def with_claims():
    """Lists the pages that answer by their claims."""
    keys = [parameters.key_of(path) for path in sorted(ROOT.glob("notebooks/*/*.ipynb"))]
    return [key for key in keys if "page.answer(claims)" in parameters.source(key).read_text()]


@pytest.mark.parametrize("key", with_claims())
def test_every_page_with_claims_answers_its_title_whatever_the_verdict(key):
    study = key.partition("/")[0]
    answered = papers.load(study).get("answers", {}).get(key)
    assert answered, f"write under `answers` in data/papers/{study}.yaml what {key} answers"
    judged = {claim.id for claim in (*ledger.of_page(key), *ledger.judged_on(key))}
    assert 1 <= len(answered) <= 3 and answered.keys() <= judged
    for words in answered.values():
        assert OUTCOMES <= words.keys() <= OUTCOMES | {"opposite"}
        assert len(set(words.values())) == len(words)
        assert all(sentence.count("{ours}") == 1 for sentence in words.values())
    first = next(iter(answered.values()))
    assert all(sentence.startswith("**") for sentence in first.values())


def test_no_answer_is_of_a_page_that_is_not_there():
    answered = [key for name in papers.names() for key in papers.load(name).get("answers", {})]
    assert sorted(answered) == sorted(with_claims())
