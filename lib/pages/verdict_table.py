"""The table of verdicts as HTML: a row a claim, whose parts and records unfold; filtered without a
server by `book/_static/verdicts.js`, and whole without JavaScript.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..verdicts import MARKS, WORDS, count, ledger
from ..verdicts.papers import load
from . import datasets

Row = Mapping[str, Any]
COLUMNS = ("Claim", "Paper", "Ours", "Verdict", "Seeds", "Data")
ALONE = ", alone"


def table(rows: Sequence[Row], listed: Sequence[Row], titles: Mapping[str, str]) -> str:
    """Writes a table of claims. rows: those that get a row; listed: all, parts among them;
    titles: the short name of each study."""
    entries = ledger.claims()
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    body = "\n".join(_claim(row, listed, entries, titles[row["study"]]) for row in rows)
    # what a seed draws, where it is less than a model of its own
    studies = dict.fromkeys(row["study"] for row in rows)
    notes = [load(study)["paper"].get("seeds", "") for study in studies]
    caption = f"<caption>{' '.join(filter(None, notes))}</caption>" if any(notes) else ""
    return (
        f'<table class="verdicts">{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table>"
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
    decisive = next((part for part in parts if part["id"] == row["decisive"]), None)
    cells = [
        f'<th scope="row" id="{anchor(row)}">{statement}</th>',
        _cell(_paper(row, entries), "Paper"),
        _cell(_ours(row, parts, decisive), "Ours"),
        f'<td data-name="Verdict">{badge(row)}{_differing(row, decisive)}</td>',
        _cell(_seeds_behind(row, parts, decisive), "Seeds"),
        _cell(_data(row, parts), "Data"),
    ]
    # found by the filter under each verdict that the row shows
    found = "; ".join(dict.fromkeys(_bare(one) for one in (row, decisive or row)))
    return (
        f'<tr class="claim" data-study="{row["study"]}" data-verdict="{found}">'
        f"{''.join(cells)}</tr>"
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
        f"{_cell(_effect(part))}{_cell(seeds(part, 'seed'))}<td>{badge(part)}</td></tr>"
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


def _ours(row: Row, parts: Sequence[Row], decisive: Row | None) -> str:
    """Says the effect; of a joint claim that of the part that decides it, else how many hold."""
    if decisive:
        return f"{decisive['id']}: {_effect(decisive)}"
    if not parts:
        return _effect(row)
    from ..report.text import parts_held

    words = [part["verdict"] or "not tested" for part in parts]
    untested = set(words) == {"not tested"}
    return "" if untested else parts_held(words)


def _differing(row: Row, decisive: Row | None) -> str:
    """Writes the verdict on the part whose number is shown, where it is not that of the whole."""
    if decisive is None or word_of(decisive) == word_of(row):
        return ""
    return f"<br>{decisive['id']}: {badge(decisive)}"


def _effect(row: Row) -> str:
    """Says effect and interval; without one, what the page says of the claim."""
    text = row["text"] or ""
    return text.partition(";")[0].partition(", n=")[0] if row["effect"] is not None else text


def _seeds_behind(row: Row, parts: Sequence[Row], decisive: Row | None) -> str:
    """Says how many seeds the number beside it has, and of a joint claim what else is a pilot."""
    if not parts:
        return seeds(row)
    if decisive is None:
        return "pilot in some parts" if row["pilot"] else ""
    elsewhere = "; pilot in other parts" if row["pilot"] and not decisive["pilot"] else ""
    return f"{seeds(decisive)}{elsewhere}"


def seeds(row: Row, noun: str = "") -> str:
    """Says how many seeds a number has, of how many planned; none where there is no number."""
    if row["method"] == "exact":  # counted, so that no chance is in it
        return "no seeds"
    if not row["n"]:
        return ""
    planned = max(row["planned_n"] or 0, row["n"])
    of = f"{row['n']} of " if planned > row["n"] else ""
    all_of_them = count(planned, noun) if noun else planned
    return f"{of}{all_of_them}{', pilot' if row['pilot'] else ''}"


def _data(row: Row, parts: Sequence[Row]) -> str:
    """Names the data behind a claim; an effect without records is of no run on images."""
    rows = (row, *parts)
    if not any(one["records"] for one in rows) and any(one["effect"] is not None for one in rows):
        return "simulated, no real images"
    return "; ".join(datasets.shown(row, parts))


def _cell(text: str, name: str = "") -> str:
    """Writes a cell. name: of its column, which a narrow screen shows before the text."""
    return f'<td data-name="{name}">{escape(text, quote=False)}</td>'


def badge(row: Row) -> str:
    """Writes a verdict with its mark; its classes give the colour."""
    word = word_of(row)
    kind = word.partition(",")[0].replace(" ", "-") + (" alone" if word.endswith(ALONE) else "")
    mark = f'<span aria-hidden="true">{mark_of(row)}</span>'
    return f'<span class="verdict {kind}">{mark} {word}</span>'


def mark_of(row: Row) -> str:
    """Returns the mark of a verdict, in brackets where it is so alone."""
    mark = MARKS[row["verdict"] or "not tested"]
    return f"({mark})" if word_of(row).endswith(ALONE) else mark


def word_of(row: Row) -> str:
    """Says the verdict; "alone" where it is not the same after the correction for many claims."""
    if row["verdict"] is None:
        return "not tested" if row["reason"] else "not judged yet"
    return row["verdict"] + (ALONE if row["after_correction"] is False else "")


def _bare(row: Row) -> str:
    """Says the verdict without marks such as "alone"."""
    return word_of(row).removesuffix(ALONE)


def anchor(row: Row) -> str:
    """Names the place of a claim on the page, such as claim-V1a."""
    return f"claim-{row['id'].replace('.', '-')}"


def published(entry: ledger.Claim) -> str:
    """Says what was published; `lib.report` is loaded late, since an idle build needs none."""
    from ..report.text import published as said

    return said(entry)


def words(rows: Iterable[Row]) -> list[str]:
    """Lists the verdicts that the rows have, without marks such as "alone"."""
    found = {_bare(row) for row in rows}
    return [word for word in (*WORDS, "not judged yet") if word in found]
