"""Answers that no page of a study has by itself: those of the front page (questions, studies and
wishes of readers) and those on which the documents disagree. What is asked stands in
`book/front.yaml`; the answers are made of verdicts and measured times. Nothing is judged here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from ..paths import ROOT
from ..verdicts import DECIDED, MARKS, speed
from ..verdicts.papers import load
from . import all_verdicts, datasets
from .verdict_table import anchor, word_of

Row = Mapping[str, Any]
CUT = ("extracted", "static model")  # what the sentence on the clock compares to the whole model


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
        bullets = [_bullet(row, rows) for row in asked]
        lines += [f"**{question['ask']}** {lead(asked)}", "", *bullets, ""]
    lines += ["The documents answer some questions [differently](contradictions.md).", ""]
    lines += ["## I want to know ...", ""]
    for want in front["wants"]:
        lines += [*_want(want, rows), ""]
    lines += ["## The five studies", "", "::::{grid} 1 1 2 2", ":gutter: 3", ""]
    for study in all_verdicts.in_order(front["studies"], keys):
        lines += [*_card(study, front["studies"][study], rows.values()), ""]
    lines += ["::::", "", _colophon(rows.values())]
    return "\n".join(lines) + "\n"


def contradictions(keys: Sequence[str]) -> str:
    """Writes the claims of documents that disagree, question by question; see `page`."""
    front, rows = _read(keys)
    lines = []
    for question in front.get("contradictions", []):
        asked = [rows[claim] for claim in question["claims"]]
        lines += [f"## {question['ask']}", "", question["about"], ""]
        for row in asked:
            study = load(row["study"])["paper"].get("short", row["study"])
            who = study if row["kind"] == "document" else f"this book, on {study}"
            lines.append(f"- {who}: {_bullet(row, rows).removeprefix('- ')}")
        lines.append("")
    return "\n".join(lines)


def _read(keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, Row]]:
    """Reads the file, and all claims by their ids; a book without the file asks nothing."""
    file = ROOT / "book" / "front.yaml"
    if not file.is_file():
        return {}, {}
    front = yaml.safe_load(file.read_text(encoding="utf-8"))
    rows = {row["id"]: row for row in all_verdicts.rows(keys)}
    _check(front, rows, keys)
    return front, rows


def _check(front: Mapping[str, Any], rows: Mapping[str, Row], keys: Sequence[str]) -> None:
    """Raises ValueError for what the file names and the book does not have."""
    claims = [claim for part in ("questions", "wants", "contradictions")
              for one in front.get(part, [])
              for claim in one.get("claims", [])]  # fmt: skip
    pages = [page for want in front["wants"] for page in want["pages"]]
    pages += [page for card in front["studies"].values() for page in card.values()]
    absent = [name for name in claims if name not in rows]
    absent += [name for name in pages if name not in keys]
    if absent:
        raise ValueError(
            f"book/front.yaml names {', '.join(absent)}, which the book does not have: name claims "
            "of the ledger (data/papers) and pages of _toc.yml"
        )


def lead(asked: Sequence[Row]) -> str:
    """Says in a sentence which way the verdicts of a question go."""
    held = sum(word_of(row).startswith("holds") for row in asked)
    open_claims = sum(row["verdict"] not in DECIDED for row in asked)
    if open_claims == len(asked):
        return "*Open:* none of the claims on it is decided yet."
    none = "Not so far" if open_claims else "No"
    way = "Yes" if held == len(asked) else "In part" if held else none
    still = f", {open_claims} still open" if open_claims else ""
    return f"*{way}:* {held} of {len(asked)} claims on it hold{still}."


def _bullet(row: Row, rows: Mapping[str, Row]) -> str:
    """Writes a claim with our number and the verdict, linked to its row of all verdicts.

    A part of a joint claim follows the sentence of that.
    """
    from ..report.text import plain

    before = f"{rows[row['part_of']]['statement']} " if row["part_of"] else ""
    text = (row["text"] or "").partition("; ")[0] if row["effect"] is not None else ""
    ours = f": {text}" if text else ""
    mark = MARKS[row["verdict"] or "not tested"]
    name = f'<a href="verdicts.html#{anchor(row)}">{row["id"]}</a>'
    statement = plain(before + row["statement"].removesuffix("."))
    return f"- {mark} *{word_of(row)}*: {statement}{ours} ({name})"


def _want(want: Mapping[str, Any], rows: Mapping[str, Row]) -> list[str]:
    """Writes what a reader wants, the answer, and the pages that have it whole."""
    told = [want["text"]] if "text" in want else []
    if "speed_up" in want:
        told.append(clock(want["speed_up"]))
    links = ", ".join(f"[](notebooks/{key}.ipynb)" for key in want["pages"])  # MyST knows titles
    return [
        f"**{want['want']}**",
        "",
        *(_bullet(rows[claim], rows) for claim in want.get("claims", [])),
        "",
        " ".join([*told, f"More: {links}."]),
    ]


def clock(wanted: float) -> str:
    """Says how much faster cut models are on the clock, and, above 1, whether that is enough.

    wanted: how many times as fast as the whole model.
    """
    try:
        measured = speed.read(speed.file_of("short"))
    except FileNotFoundError:
        return "No time is measured yet (`make bench`)."
    rows = [row for row in measured.of("models") if row.against == "whole model"]
    parts = []
    for kind in CUT:
        times = {row.dtype: [] for row in rows}
        for row in (row for row in rows if row.ours_is == kind):
            times[row.dtype].append((row.other.median / row.ours.median, row.shape))
        said = [f"{ratio:.2f} in {dtype} ({shape})" for dtype, found in times.items()
                for ratio, shape in [max(found)] if found]  # fmt: skip
        parts.append(f"{'the mixture' if kind == 'extracted' else kind} {', '.join(said)}")
    best = max(row.other.median / row.ours.median for row in rows if row.ours_is in CUT)
    machine = measured.about["machine"]
    enough = ""
    if wanted > 1:
        enough = (
            f" That reaches {wanted:g} times; what it costs in accuracy stands above."
            if best >= wanted
            else f" **Nothing here is {wanted:g} times as fast.**"
        )
    caution = " Other work ran beside it, so these are uncertain." if measured.disturbed else ""
    return (
        f"At half of the neurons, times as fast as the whole model, at best: {'; '.join(parts)} "
        f"({machine['processor']}, threads: {machine['threads']}).{enough}{caution}"
    )


def _card(study: str, links: Mapping[str, str], rows: Iterable[Row]) -> list[str]:
    """Writes the card of a study: where its claims stand, its data, and where to begin."""
    whole = [row for row in rows if row["study"] == study and row["part_of"] is None]
    own = [row for row in whole if row["kind"] == "document" and row["reason"] is None]
    held = sum(all_verdicts.decided(row) and all_verdicts.holds(row) for row in own)
    against = sum(row["verdict"] in ("not reproduced", "opposite") for row in own)
    paper = load(study)["paper"]
    data = dict.fromkeys(name for row in whole for name in datasets.shown(row, []))
    counted = (
        f"{held} of {len(own)} claims hold, {against} do not, {len(own) - held - against} open"
    )
    return [
        f":::{{grid-item-card}} {paper.get('short', study)}",
        f"*{paper['title']}*",
        "",
        f"**{counted}.** Data: {'; '.join(data) or 'none yet'}.",
        "",
        f"[](notebooks/{links['start']}.ipynb) · "
        f"[what it costs](notebooks/{links['cost']}.ipynb) · "
        f'<a href="verdicts.html#study={study}">its verdicts</a>',
        ":::",
    ]


def _colophon(rows: Iterable[Row]) -> str:
    """Says which version this is, from when its newest record is, and how it is cited."""
    from .status import content_of, written

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    runs = {run for row in rows for run in row["records"]}
    dates = [date for run in runs if (date := written(content_of(run)))]
    newest = f", with records until {max(dates):%d %B %Y}" if dates else ""
    return f"Version {project['version']}{newest}. To cite it: `CITATION.cff` in its sources."
