"""The table of verdicts as HTML: a row a claim, whose parts and records unfold; filtered without a
server by `book/_static/verdicts.js`, and whole without JavaScript.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..verdicts import MARKS, WORDS, count, ledger
from . import datasets

Row = Mapping[str, Any]
COLUMNS = ("Claim", "Paper", "Ours", "Verdict", "Seeds", "Data")


def table(rows: Sequence[Row], listed: Sequence[Row], titles: Mapping[str, str]) -> str:
    """Writes a table of claims. rows: those that get a row; listed: all, parts among them;
    titles: the short name of each study."""
    entries = ledger.claims()
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    body = "\n".join(_claim(row, listed, entries, titles[row["study"]]) for row in rows)
    return (
        f'<table class="verdicts"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
    )


def _claim(row: Row, listed: Sequence[Row], entries: Mapping[str, ledger.Claim], title: str) -> str:
    """Writes the row of a claim; its parts and its records stand folded below the statement."""
    parts = [part for part in listed if part["part_of"] == row["id"]]
    source = "this book" if row["kind"] == "ours" else row["source"]
    link = f'<a href="notebooks/{row["page"]}.html#verdicts">{row["page"]}</a>'
    where = source if row["page"] is None else f"{source}; {link}"
    statement = (
        f'<span class="study">{escape(title)}</span> <b>{row["id"]}</b> '
        f'{escape(row["statement"], quote=False)} <span class="source">({where})</span>'
        f"{_measured(entries[row['id']])}{_more(row, parts, entries)}"
    )
    if row["reason"]:
        statement += f"<br>{escape(row['reason'], quote=False)}"
    word = word_of(row)
    cells = [
        f'<th scope="row" id="{anchor(row)}">{statement}</th>',
        _cell(_paper(row, entries), "Paper"),
        _cell(_ours(row, parts), "Ours"),
        f'<td data-name="Verdict">{badge(row)}</td>',
        _cell(_seeds(row, parts), "Seeds"),
        _cell("; ".join(datasets.shown(row, parts)), "Data"),
    ]
    return (
        f'<tr class="claim" data-study="{row["study"]}" data-verdict="{word}">{"".join(cells)}</tr>'
    )


def _measured(entry: ledger.Claim) -> str:
    """Names the number that is judged where it is not test accuracy."""
    said = escape(entry.measured, quote=False)
    return f' <span class="source">Measured: {said}.</span>' if said else ""


def _more(row: Row, parts: Sequence[Row], entries: Mapping[str, ledger.Claim]) -> str:
    """Writes what unfolds: a line a part, and the records behind the verdict."""
    runs = sorted({run for one in (row, *parts) for run in one["records"]})
    if not parts and not runs:
        return ""
    lines = [
        f'<tr id="{anchor(part)}"><th scope="row"><b>{part["id"]}</b> '
        f"{escape(part['statement'], quote=False)}{_measured(entries[part['id']])}</th>"
        f"{_cell(published(entries[part['id']]))}"
        f"{_cell(_effect(part))}<td>{badge(part)}</td></tr>"
        for part in parts
    ]
    inner = f'<table class="parts"><tbody>{"".join(lines)}</tbody></table>' if parts else ""
    if runs:
        files = ", ".join(f"<code>{run}</code>" for run in runs)
        inner += f"<p>Records in <code>data/results</code>: {files}</p>"
    listed = {"part": parts, "record": runs}
    counted = ", ".join(count(len(items), noun) for noun, items in listed.items() if items)
    return f"<details><summary>{counted}</summary>{inner}</details>"


def _paper(row: Row, entries: Mapping[str, ledger.Claim]) -> str:
    """Says what was published; of a joint claim, of the part that decides it."""
    part = row["decisive"]
    said = published(entries[part or row["id"]])
    return f"{part}: {said}" if part and said else said


def _ours(row: Row, parts: Sequence[Row]) -> str:
    """Says the effect; of a joint claim that of the part that decides it, else how many hold."""
    if not parts:
        return _effect(row)
    from ..report.text import parts_held

    of_id = {part["id"]: f"{part['id']}: {_effect(part)}" for part in parts}
    words = [part["verdict"] or "not tested" for part in parts]
    untested = set(words) == {"not tested"}
    return of_id.get(row["decisive"], "" if untested else parts_held(words))


def _effect(row: Row) -> str:
    """Says effect and interval; without one, what the page says of the claim."""
    text = row["text"] or ""
    return text.partition(";")[0].partition(", n=")[0] if row["effect"] is not None else text


def _seeds(row: Row, parts: Sequence[Row]) -> str:
    """Says how many seeds there are of how many planned, over the parts of a joint claim."""
    over = [one for one in (parts or [row]) if one["n"]]
    if not over:
        return ""
    least = min(over, key=lambda one: (one["n"], -(one["planned_n"] or 0)))
    planned = least["planned_n"] or least["n"]
    more = f" of {planned}" if planned > least["n"] else ""
    return f"{least['n']}{more}{', pilot' if row['pilot'] else ''}"


def _cell(text: str, name: str = "") -> str:
    """Writes a cell. name: of its column, which a narrow screen shows before the text."""
    return f'<td data-name="{name}">{escape(text, quote=False)}</td>'


def badge(row: Row) -> str:
    """Writes a verdict with its mark; its class gives the colour."""
    word = word_of(row)
    mark = MARKS[row["verdict"] or "not tested"]
    kind = word.partition(",")[0].replace(" ", "-")
    return f'<span class="verdict {kind}"><span aria-hidden="true">{mark}</span> {word}</span>'


def word_of(row: Row) -> str:
    """Says the verdict; "alone" where it does not hold after the correction for many claims."""
    if row["verdict"] is None:
        return "not tested" if row["reason"] else "not judged yet"
    alone = row["verdict"].startswith("holds") and not row["after_correction"]
    return row["verdict"] + (", alone" if alone else "")


def anchor(row: Row) -> str:
    """Names the place of a claim on the page, such as claim-V1a."""
    return f"claim-{row['id'].replace('.', '-')}"


def published(entry: ledger.Claim) -> str:
    """Says what was published; `lib.report` is loaded late, since an idle build needs none."""
    from ..report.text import published as said

    return said(entry)


def words(rows: Iterable[Row]) -> list[str]:
    """Lists the verdicts that the rows have, without marks such as "alone"."""
    found = {word_of(row).removesuffix(", alone") for row in rows}
    return [word for word in (*WORDS, "not judged yet") if word in found]
