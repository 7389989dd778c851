"""Answers that no page of a study has by itself: those of the front page (questions, studies and
wishes of readers) and those on which the documents disagree. What is asked stands in
`book/front.yaml`; the answers are made of verdicts and measured times. Nothing is judged here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from ..paths import ROOT
from ..verdicts import agree, count
from ..verdicts.papers import load
from . import all_verdicts, answers, datasets, front_numbers
from .verdict_table import anchor, mark_of, word_of

Row = Mapping[str, Any]
FIGURE = "headline-figure"  # the tag of `order`
IMAGE = re.compile(r'<img [^>]*?(alt="[^"]*" src="data:image/png;base64,[^"]*")')
ANSWER = re.compile(r"^\*\*Answer\.\*\* (.+)$", re.MULTILINE)  # of `report.text.boxed`


def page(keys: Sequence[str]) -> str:
    """Writes the generated part of the front page, MyST Markdown; nothing without its file.

    Raises ValueError for a claim or a page in `book/front.yaml` that is not there.
    """
    front, rows = _read(keys)
    if not front:
        return ""
    lines = ["## Four questions", ""]
    for question in front["questions"]:
        asked = [rows[claim] for claim in question["claims"]]
        answered = [f"- {sentence}" for sentence in (*said(question, rows), *_measured(question))]
        counted = lead(asked).replace("*", "")
        lines += [f"**{question['ask']}**", "", *answered, "", *_behind(asked, rows, counted), ""]
    lines += ["To some questions the documents have different answers: [](contradictions.md).", ""]
    lines += compared(front["compared"])
    lines += ["## What do you want to do?", ""]
    for want in front["wants"]:
        lines += [*_want(want, rows, front["compared"]), ""]
    # one below the other: a figure at half the width of the page has letters too small to read
    lines += ["## The five studies", "", "::::{grid} 1", ":gutter: 3", ""]
    for study in all_verdicts.in_order(front["studies"], keys):
        lines += [*_card(study, front["studies"][study], list(rows.values())), ""]
    lines += ["::::", "", _colophon(rows.values())]
    return "\n".join(lines) + "\n"


def contradictions(keys: Sequence[str]) -> str:
    """Writes the claims of documents that disagree, question by question; see `page`."""
    front, rows = _read(keys)
    lines = []
    for question in front.get("contradictions", []):
        asked = [rows[claim] for claim in question["claims"]]
        answer = " ".join([*said(question, rows), lead(asked)])
        lines += [f"## {question['ask']}", "", answer, "", question["about"], ""]
        for row in asked:
            study = load(row["study"])["paper"].get("short", row["study"])
            who = study if row["kind"] == "document" else f"this book, on {study}"
            lines.append(f"- {who}: {_bullet(row, rows).removeprefix('- ')}")
        lines.append("")
    return "\n".join(lines)


def _asked() -> dict[str, Any]:
    """Reads `book/front.yaml`; a book without the file asks nothing."""
    file = ROOT / "book" / "front.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _read(keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, Row]]:
    """Reads what is asked, and all claims by their ids; neither without the file."""
    front = _asked()
    if not front:
        return {}, {}
    rows = {row["id"]: row for row in all_verdicts.rows(keys)}
    _check(front, rows, keys)
    return front, rows


def _check(front: Mapping[str, Any], rows: Mapping[str, Row], keys: Sequence[str]) -> None:
    """Raises ValueError for what the file names and the book does not have."""
    parts = ("questions", "wants", "contradictions")
    asked = [one for part in parts for one in front.get(part, [])]
    claims = [claim for one in asked for claim in (*one.get("claims", []), *one.get("says", {}))]
    pages = [page for want in front["wants"] for page in want["pages"]]
    pages += [page for card in front["studies"].values() for page in card.values()]
    pages += [front["compared"]]
    pages += [sentence["page"] for one in asked for sentence in one.get("measured", [])]
    absent = [name for name in claims if name not in rows]
    absent += [name for name in pages if name not in keys]
    if absent:
        raise ValueError(
            f"book/front.yaml names {', '.join(absent)}, which the book does not have: name claims "
            "of the ledger (data/papers) and pages of _toc.yml"
        )


def said(asked: Mapping[str, Any], rows: Mapping[str, Row]) -> list[str]:
    """Answers in a sentence for each claim under `says`: the one for its verdict, with our number
    ({ours}) and its data ({on}).

    One that is opposite, or holds alone, has a sentence of its own where the file gives one. A
    claim that is not decided and has no sentence for that is left to the list below the answer.
    """
    sentences = []
    for claim, words in asked.get("says", {}).items():
        row = rows[claim]
        if chosen := answers.sentence(words, row["verdict"], all_verdicts.stands(row)):
            on = "; ".join(datasets.shown(row, []))
            sentences.append(chosen.format(ours=_numbers(row), on=on))
    return sentences


def _measured(asked: Mapping[str, Any]) -> list[str]:
    """Lists the sentences under `measured`, over records; see `front_numbers.measured`."""
    return list(filter(None, map(front_numbers.measured, asked.get("measured", []))))


def _outcome(row: Row) -> str:
    """Says whether a claim holds, fails or is open, as `says` in the file names it."""
    return answers.outcome(row["verdict"], all_verdicts.stands(row))


def _counted(claims: Iterable[Row]) -> list[int]:
    """Counts the claims that hold, that fail and that are open."""
    outcomes = [_outcome(row) for row in claims]
    return [outcomes.count(outcome) for outcome in ("holds", "fails", "open")]


def _numbers(row: Row) -> str:
    """Returns effect, interval and number of seeds; "" without an effect."""
    return (row["text"] or "").partition("; ")[0] if row["effect"] is not None else ""


def lead(asked: Sequence[Row]) -> str:
    """Counts the verdicts of a question.

    Which way they speak is left to `said`: a claim that holds may speak against what is asked. One
    that holds alone is open.
    """
    held, against, open_claims = _counted(asked)
    if open_claims == len(asked):
        return "*Open:* none of the claims on it is decided yet."
    fail = f", {against} {agree('do', against)} not" if against else ""
    still = f", {open_claims} still open" if open_claims else ""
    hold = agree("hold", held, len(asked))
    return f"*Counted:* {held} of {count(len(asked), 'claim')} on it {hold}{fail}{still}."


def _behind(asked: Sequence[Row], rows: Mapping[str, Row], summary: str = "") -> list[str]:
    """Folds the claims behind an answer below it; nothing where there are none.

    summary: the line that stays in sight; by default how many claims there are.
    """
    if not asked:
        return []
    bullets = [_bullet(row, rows) for row in asked]
    summary = summary or f"{count(len(asked), 'claim')} behind this"
    return [f"<details><summary>{summary}</summary>", "", *bullets, "", "</details>"]


def _bullet(row: Row, rows: Mapping[str, Row]) -> str:
    """Writes a claim with our number, the verdict and the data, linked to its row of all verdicts.

    A part of a joint claim names that, and its verdict, behind its own.
    """
    from ..report.text import plain

    # a number without a unit says nothing unless one knows of what it is
    of_what = f" ({plain(row['statistic'])})" if row["statistic"] and not row["unit"] else ""
    ours = f": {_numbers(row)}{of_what}" if _numbers(row) else ""
    name = f'<a href="verdicts.html#{anchor(row)}">{row["id"]}</a>'
    parts = [part for part in rows.values() if part["part_of"] == row["id"]]
    data = "; ".join(datasets.shown(row, parts))
    on = f", on {data}" if data else ""
    whole = ""
    if row["part_of"]:
        joint = rows[row["part_of"]]
        whole = (
            f'; one part of "{plain(joint["statement"])}", which as a whole is: {word_of(joint)}'
        )
    statement = plain(row["statement"].removesuffix("."))
    return f"- {mark_of(row)} *{word_of(row)}*: {statement}{ours} ({name}{on}{whole})"


def _want(want: Mapping[str, Any], rows: Mapping[str, Row], compared_on: str) -> list[str]:
    """Writes what a reader wants, the answer, the claims behind it, and the pages that have it
    whole. compared_on: the page that compares all methods, for a wish with a budget (`within`)."""
    answer = [*said(want, rows), *_measured(want)]
    if "speed_up" in want:
        fastest, limit, times = front_numbers.clock()
        if want["speed_up"] <= 1:
            answer += [times, limit]
        else:
            answer += [front_numbers.at_best(fastest), limit]
            kept = [_outcome(rows[claim]) for claim in want["says"]][:1]
            mixture = next(iter(fastest.values()), None)  # whose accuracy the first claim is on
            answer.insert(0, enough(mixture, want["speed_up"], kept[0] if kept else "open"))
    if "within" in want:
        answer.append(front_numbers.nearest(compared_on, want["within"]))
    answer = [sentence for sentence in (*answer, want.get("text")) if sentence]
    links = ", ".join(f"[](notebooks/{key}.ipynb)" for key in want["pages"])  # MyST knows titles
    return [
        f"**{want['want']}**",
        "",
        *(f"- {sentence}" for sentence in answer),
        f"- More: {links}.",
        "",
        *_behind([rows[claim] for claim in want.get("claims", [])], rows),
    ]


def enough(fastest: float | None, wanted: float, accuracy: str) -> str:
    """Says whether anything here is fast enough and accurate enough.

    fastest: times as fast as the whole model; None = not measured. accuracy: whether the claim that
    it is kept holds, fails or is open.
    """
    if accuracy == "fails" or (fastest is not None and fastest < wanted):
        return "**Nothing measured here does that.**"
    if accuracy == "open" or fastest is None:
        return "**Not known yet.**"
    return "**Yes, as measured here.**"


def in_short(listed: Sequence[Row]) -> list[str]:
    """Answers the page with which each study begins, in a line of Markdown a study."""
    lines = []
    for study, links in _asked().get("studies", {}).items():
        short = load(study)["paper"].get("short", study)
        lines.append(f"- {short}. {answers.of_rows(links['start'], listed)}")
    return lines


def _card(study: str, links: Mapping[str, str], rows: Sequence[Row]) -> list[str]:
    """Writes the card of a study: where its claims stand, its data, and where to begin."""
    whole = [row for row in rows if row["study"] == study and row["part_of"] is None]
    own = [row for row in whole if row["kind"] == "document" and row["reason"] is None]
    paper = load(study)["paper"]
    data = dict.fromkeys(name for row in whole for name in datasets.shown(row, []))
    return [
        f":::{{grid-item-card}} {paper.get('short', study)}",
        f"*{paper['title']}*",
        "",
        answers.of_rows(links["start"], rows),
        "",
        *picture(links.get("figure", links["start"])),
        f"**{standing(own)}.** Data: {'; '.join(data) or 'none yet'}.",
        "",
        f"[](notebooks/{links['start']}.ipynb) · "
        f"[what it costs](notebooks/{links['cost']}.ipynb) · "
        f'<a href="verdicts.html#study={study}">its verdicts</a>',
        ":::",
    ]


def standing(claims: Sequence[Row]) -> str:
    """Says how many claims hold, do not, and are open; one that holds alone is open."""
    held, against, open_claims = _counted(claims)
    return (
        f"{held} of {count(len(claims), 'claim')} {agree('hold', held, len(claims))}, "
        f"{against} {agree('do', against)} not, {open_claims} open"
    )


def picture(key: str, narrowest: int = 0) -> list[str]:
    """Shows the figure at the head of an executed page once more, as a link to it there; nothing
    where it has none. narrowest: pixels below which it scrolls instead of shrinking."""
    for cell in all_verdicts.cells(key):
        if FIGURE not in cell["metadata"].get("tags", ()):
            continue
        for output in cell.get("outputs", ()):
            shown = "".join(output.get("data", {}).get("text/html", ""))
            if found := IMAGE.search(shown):
                style = f"width:100%;min-width:{narrowest}px;max-width:none;height:auto"
                image = f'<img class="dark-light" {found[1]} style="{style};background:#fff">'
                link = f'<a href="notebooks/{key}.html#{FIGURE}">{image}</a>'
                return [f'<div style="overflow-x:auto">{link}</div>', ""]
    return []


def compared(key: str) -> list[str]:
    """Shows the figure and the answer of the page that compares all methods; nothing before it has
    a figure."""
    from ..report.style import NARROWEST

    shown = picture(key, NARROWEST)
    if not shown:
        return []
    texts = (
        "".join(output.get("data", {}).get("text/markdown", ""))
        for cell in all_verdicts.cells(key)
        for output in cell.get("outputs", ())
    )
    answered = [found[1] for text in texts if (found := ANSWER.search(text))]
    return [
        "## All methods side by side",
        "",
        " ".join([*answered[:1], f"More: [](notebooks/{key}.ipynb)."]),
        "",
        *shown,
    ]


def _colophon(rows: Iterable[Row]) -> str:
    """Says which version this is, from when its newest record is, and how it is cited."""
    from .status import content_of, written

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    runs = {run for row in rows for run in row["records"]}
    dates = [date for run in runs if (date := written(content_of(run)))]
    newest = f", with records until {max(dates):%d %B %Y}" if dates else ""
    return (
        f"Version {project['version']}{newest}. Licence of code and text: {project['license']}. "
        "To cite it: `CITATION.cff` in its sources, or the foot of each page."
    )
