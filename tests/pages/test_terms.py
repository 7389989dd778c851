"""The first use of a term leads to the glossary, and nothing else on the page changes."""

from __future__ import annotations

import re

import pytest

from lib.pages import terms
from lib.pages.terms import Term

EXPERT = Term("expert", "term-expert", "One of several MLPs.")
TERMS = (
    EXPERT,
    Term("shared expert", "term-shared-expert", 'Every token passes it: "shared".'),
    Term("mixture of experts (MoE)", "term-moe", "Several MLPs."),
    Term("MAN", "term-MAN", "A score."),
    Term("run", "term-run", "One training."),
    Term("capacity", "term-capacity", "The most tokens."),
    Term("multiply-adds (MACs)", "term-macs", "One product and one sum."),
    Term("stand-in", "term-stand-in", "Data in the place of others."),
)


def linked(body: str) -> str:
    return terms.linked(body, TERMS, "../glossary.html")


def links(body: str) -> list[tuple[str, str]]:
    """The anchors and texts of the links that were set."""
    pattern = r'<a class="term" href="../glossary.html#([^"]+)" title="[^"]*">([^<]*)</a>'
    return re.findall(pattern, linked(body))


def without_links(body: str) -> str:
    return re.sub(r'<a class="term"[^>]*>([^<]*)</a>', r"\1", body)


def test_the_first_use_is_a_link_with_the_meaning_and_the_second_is_not():
    assert linked("<p>An expert, and an expert.</p>") == (
        '<p>An <a class="term" href="../glossary.html#term-expert" title="One of several MLPs.">'
        "expert</a>, and an expert.</p>"
    )
    assert 'title="Every token passes it: &quot;shared&quot;."' in linked("<p>shared expert</p>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Experts win", [("term-expert", "Experts")]),
        ("a shared\nexpert", [("term-shared-expert", "shared\nexpert")]),
        ("a shared expert, a shared expert", [("term-shared-expert", "shared expert")]),
        ("Shared experts", [("term-shared-expert", "Shared experts")]),
        ("mixtures of experts", [("term-moe", "mixtures of experts")]),
        ("a mixture-of-experts (MoE) layer", [("term-moe", "mixture-of-experts")]),
        ("MoEs", [("term-moe", "MoEs")]),
        ("two capacities", [("term-capacity", "capacities")]),
        ("one multiply-add", [("term-macs", "multiply-add")]),
        ("two stand-ins", [("term-stand-in", "stand-ins")]),
        ("layers stand in every block", []),
        ("by MAN", [("term-MAN", "MAN")]),
        ("the run", [("term-run", "run")]),
        ("24 runs", [("term-run", "runs")]),
        ("a stand-in", [("term-stand-in", "stand-in")]),
    ],
)
def test_plurals_capitals_and_abbreviations_are_the_term(text, expected):
    assert links(f"<p>{text}</p>") == expected


@pytest.mark.parametrize(
    "text",
    "expertise expert_count two-expert expert-wise moee/expert expert.py H(expert)".split()
    + ["a man", "EXPERT", "it runs", "run it", "bf16 runs here", "numbers stand in a table"],
)
def test_longer_words_paths_and_other_words_are_left_alone(text):
    assert links(f"<p>{text}</p>") == []


@pytest.mark.parametrize(
    "body",
    [
        "<h2>The expert <em>of</em> experts</h2>",
        "<pre><span>expert</span> = expert</pre> ",
        "<p><code>a <b>b</b> expert</code></p>",
        '<a href="x.html"><em>expert</em></a>',
        "<table><tr><th>expert</th><td>expert</td></tr></table>",
        '<img alt="an expert > another expert" src="expert">',
        '<span class="math notranslate">expert</span>',
        "<script>if (a < b) expert = 1; // </p> expert</script>",
        "<!-- expert <p> -->",
        "<details><div><details>expert</details></div> expert</details>",
        "<button type='button'>expert</button>",
    ],
)
def test_headings_code_tables_links_and_folded_parts_are_left_alone(body):
    assert linked(body) == body
    assert links(f"{body}<p>expert</p>") == [("term-expert", "expert")]


def test_nested_tags_and_what_is_no_term_come_out_as_they_were():
    body = (
        '<div CLASS="a"><p>The <em>expert</em> & the &lt;run&gt; of AT&T<br/>'
        "<svg><linearGradient/></svg> <p>a capacity <b>without <i>an expert</i></b>"
        "<ul><li>a shared <em>expert</em></ul> the run &#8217; </div>"
    )
    assert [anchor for anchor, _ in links(body)] == ["term-expert", "term-capacity", "term-run"]
    assert without_links(linked(body)) == body


def test_what_is_linked_by_hand_is_linked():
    by_hand = '<p><a class="reference" href="../glossary.html#term-expert">Experts</a></p>'
    assert links(f"{by_hand}<p>an expert and the capacity</p>") == [("term-capacity", "capacity")]


def test_a_page_without_a_glossary_stays_as_it_is():
    assert terms.linked("<p>expert</p>", (), "") == "<p>expert</p>"


def test_the_first_sentence_ends_before_the_next():
    assert (
        terms.first_sentence("One of 2.5 MLPs, e.g. this.  Also\nthat.")
        == "One of 2.5 MLPs, e.g. this."
    )
