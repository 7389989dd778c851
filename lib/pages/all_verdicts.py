"""The page of all verdicts and `claims.json`: what the pages' answers say, beside the ledger.

A page's answer (`lib.report.text.answer`) carries its verdicts as data beside the sentence that a
reader sees. Nothing is judged here, so neither can say anything else than the pages do. What is
added is what no page can know: the correction for the number of claims of a study.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..paths import ROOT, written_whole
from ..verdicts import WORDS, agree, count, ledger
from ..verdicts.papers import load
from . import manifest, verdict_table
from .verdict_table import word_of

Row = dict[str, Any]
START, END = "<!-- state of the claims -->", "<!-- end of the state -->"


def rows(keys: Sequence[str]) -> list[Row]:
    """Lists every claim of the ledger with what the executed notebooks say of it, as plain data.

    A part of a joint claim follows it, with the joint one's id in `part_of`. `verdict` is None
    where the page has not run or says nothing of the claim, and for claims with a `reason`.
    """
    said = {claim["id"]: claim for key in keys for claim in answered(cells(key))}
    listed = []
    for study in in_order(ledger.studies(), keys):
        entries = (c for whole in ledger.of_study(study) for c in (whole, *whole.parts))
        found = [_row(claim, said.get(claim.id)) for claim in entries]
        _correct(found)
        listed += found
    return listed


def in_order(studies: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Sorts studies as the book has their pages, `keys`; those without a page come last."""
    in_book = list(dict.fromkeys(key.split("/")[0] for key in keys))
    return sorted(studies, key=lambda s: in_book.index(s) if s in in_book else len(in_book))


def _row(claim: ledger.Claim, said: Mapping[str, Any] | None) -> Row:
    """Puts an entry and the verdict on it together."""
    said = said or {}
    estimate = said.get("estimate") or {}
    return {
        "id": claim.id,
        "study": claim.study,
        "part_of": claim.part_of,
        "kind": claim.kind,
        "statement": claim.statement,
        "source": claim.source,
        "direction": claim.direction,
        "published": claim.published_size,
        "smallest": claim.size,
        "unit": claim.unit,
        "statistic": claim.statistic,
        "page": claim.page,
        "arms": list(claim.arms),
        "reason": claim.reason,
        "effect": estimate.get("mean"),
        "low": estimate.get("low"),
        "high": estimate.get("high"),
        "method": estimate.get("method"),
        "law": estimate.get("law"),
        "n": said.get("n"),
        "planned_n": None if claim.reason else claim.planned_seeds,
        "p": said.get("p"),
        "verdict": said.get("verdict"),
        "pilot": said.get("pilot"),
        "after_correction": None,
        "text": said.get("text"),
        "records": said.get("records", []),
        "decisive": said.get("decisive"),
    }


def _correct(found: Sequence[Row]) -> None:
    """Says of each claim of a study that holds, or is opposite, whether it is so after the
    correction for their number.

    None for other verdicts. A joint claim follows its parts.
    """
    from ..verdicts.many import corrected  # scipy, which an import of the build does without

    joint = {row["part_of"] for row in found} - {None}
    tested = [row for row in found if row["verdict"] and row["id"] not in joint]
    for row, after in zip(tested, corrected([row["p"] for row in tested]), strict=True):
        row["after_correction"] = after if holds(row) else None
    # the other way round each claim with a direction could have come out by chance as well
    directed = [row for row in tested if row["direction"] in ("greater", "less")]
    against = [None if row["p"] is None else 1 - row["p"] for row in directed]
    for row, after in zip(directed, corrected(against), strict=True):
        if row["verdict"] == "opposite":
            row["after_correction"] = after
    for row in found:
        if row["id"] in joint and (holds(row) or row["verdict"] == "opposite"):
            parts = [part for part in found if part["part_of"] == row["id"]]
            row["after_correction"] = all(part["after_correction"] for part in parts)


def holds(row: Row) -> bool:
    """Says whether a claim holds by its own interval."""
    return (row["verdict"] or "").startswith("holds")


def fails(row: Row) -> bool:
    """Says whether the interval of a claim excludes its size."""
    return row["verdict"] in ("not reproduced", "opposite")


def decided(row: Row) -> bool:
    """Says whether a claim is decided: one that holds, after the correction as well.

    One that is opposite alone is not reproduced, at least: its interval excludes the size.
    """
    if holds(row):
        return bool(row["after_correction"])
    return fails(row)


def stands(row: Row) -> bool:
    """Says whether a claim is after the correction what it is alone."""
    return row["after_correction"] is not False


def tested(listed: Iterable[Row]) -> list[Row]:
    """Keeps the claims that can be tested here, joint ones whole."""
    return [row for row in listed if row["part_of"] is None and row["reason"] is None]


def page(keys: Sequence[str]) -> str:
    """Writes the generated part of the page: the state, the headline claims, and the rest of each
    study, folded. MyST Markdown around tables of HTML."""
    listed = rows(keys)
    studies = in_order(ledger.studies(), keys)
    papers = {study: load(study)["paper"] for study in studies}
    titles = {study: paper.get("short", study) for study, paper in papers.items()}
    whole = [row for row in listed if row["part_of"] is None]
    entries = ledger.claims()
    headlines = [row for row in whole if entries[row["id"]].headline]
    offered = json.dumps({"studies": titles, "verdicts": verdict_table.words(whole)})
    blocks = [
        f'<div id="verdict-filter" hidden data-offered="{escape(offered)}"></div>',
        verdict_table.table(headlines, listed, titles),
    ]
    for study in studies:
        found = [row for row in listed if row["study"] == study]
        others = [row for row in found if row["part_of"] is None and row not in headlines]
        title = escape(titles[study], quote=False)
        whole_title = escape(papers[study]["title"], quote=False)
        blocks.append(
            f'<details class="study" id="{study}"><summary>{title}: '
            f"{count(len(others), 'further claim')} and controls</summary><p><i>{whole_title}.</i> "
            f"{_chance(found)}</p>{verdict_table.table(others, listed, titles)}</details>"
        )
    html = "\n".join(blocks)
    return f"{state_of(listed)}\n\n```{{raw}} html\n{html}\n```\n"


def state(keys: Sequence[str]) -> str:
    """Writes the sentences of the front page about the state of the records."""
    return state_of(rows(keys)) + "\n"


def state_of(listed: Sequence[Row]) -> str:
    """Says how many claims there are, how many are decided, and which way."""
    claims = [row for row in listed if row["part_of"] is None]
    documents = [row for row in claims if row["kind"] == "document"]
    able = tested(documents)
    settled_here = sum(map(decided, able))
    own = len(claims) - len(documents)
    words = Counter(word_of(row) for row in able)
    listing = "; ".join(f"{words[word]} *{word}*" for word in words_in_order(words))
    pilots = sum(bool(row["pilot"]) for row in able if decided(row))
    records = len({run for row in listed for run in row["records"]})
    return (
        f"**State of the claims.** The documents make {count(len(documents), 'claim')}. "
        f"{len(able)} can be tested here and {settled_here} of these "
        f"{agree('are', settled_here)} decided, {pilots} of them with seeds still to come. "
        f"All verdicts: {listing}. {count(own, 'control')} of this book "
        f"{agree('stand', own)} beside them. Behind these verdicts {agree('are', records)} "
        f"{count(records, 'record')} of runs."
    )


def words_in_order(words: Iterable[str]) -> list[str]:
    """Sorts verdicts as every list has them; marks such as those of the correction stay with
    their word."""
    return sorted(words, key=lambda word: (_place(word), word))


def _place(word: str) -> int:
    fits = [place for place, known in enumerate(WORDS) if word.startswith(known)]
    return max(fits, default=len(WORDS))


def _chance(found: Sequence[Row]) -> str:
    """Says how many of a study's claims were tested, and how many false ones to expect."""
    from ..verdicts.many import BY_CHANCE

    joint = {row["part_of"] for row in found} - {None}
    single = [row for row in found if row["id"] not in joint and row["p"] is not None]
    alone = [row for row in single if holds(row)]
    after = sum(bool(row["after_correction"]) for row in alone)
    excluded = list(filter(fails, single))
    return (
        f"{len(single)} claims and parts {agree('have', len(single))} an interval. If all of "
        f"them were false, at most {BY_CHANCE * len(single):.1f} would hold by chance; "
        f"{len(alone)} {agree('hold', len(alone))}. After the correction for their number {after} "
        f"{agree('hold', after)}, of which at most {BY_CHANCE * after:.1f} are expected to be "
        f"false. {len(excluded)} {agree('are', len(excluded))} not reproduced or opposite; if "
        f"all claims had their sizes, at most {BY_CHANCE * len(single):.1f} would be by chance."
    )


def read() -> list[Row]:
    """Reads `claims.json` of the last build. Raises FileNotFoundError where there is none."""
    path = ROOT / "book" / "claims.json"
    if not path.is_file():
        raise FileNotFoundError(f"book/{path.name} is not there: `make book` writes it")
    return json.loads(path.read_text(encoding="utf-8"))


def settled() -> dict[str, bool]:
    """Says of each claim whose verdict stands in the last build whether it is settled: False while
    seeds are still to come, which may change it.

    A part of a joint claim whose verdict stands is among them. It is settled with that claim where
    it has a verdict on all its seeds. Empty where nothing was built: then all claims are open.
    """
    try:
        listed = read()
    except FileNotFoundError:
        return {}
    stand = {row["id"]: not row["pilot"] for row in listed if decided(row)}
    parts = {
        row["id"]: stand[row["part_of"]]
        and row["verdict"] not in (None, "not tested")
        and not row["pilot"]
        for row in listed
        if row["part_of"] in stand
    }
    return parts | stand  # a part's own verdict, where that stands


def overview(listed: Sequence[Row]) -> str:
    """Writes the state, and what is open: a line for each claim that can be tested."""
    lines = [state_of(listed).replace("*", ""), ""]
    for row in listed:
        if row["reason"] is None and not decided(row):
            seeds = f"n={row['n'] or 0} of {row['planned_n']}"
            lines.append(f"{row['id']:10} {word_of(row):36} {seeds:12} {row['page']}")
    return "\n".join(lines)


def write_readme(listed: Sequence[Row], in_short: Sequence[str]) -> None:
    """Puts lines that answer in short, and the state of the claims, into README.md: between its
    two marks."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have {START} and {END} once each")
    before, _, rest = text.partition(START)
    lines = (textwrap.fill(line, 125, subsequent_indent="  ") for line in in_short)
    written = "\n".join([*lines, *([""] if in_short else []), textwrap.fill(state_of(listed), 125)])
    with written_whole(path) as part:
        part.write_text(
            f"{before}{START}\n{written}\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )


def answered(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the verdicts of an executed notebook's answer, as data; none without an answer."""
    for cell in cells:
        for output in cell.get("outputs", ()):
            data = output.get("metadata", {}).get("text/markdown", {})
            if data.get("claims"):
                return data["claims"]
    return []


def as_json(keys: Sequence[str]) -> str:
    """Writes `claims.json`."""
    return json.dumps(rows(keys), indent=1) + "\n"


def cells(key: str) -> list[dict[str, Any]]:
    """Reads the cells of the executed copy; none where it is not there."""
    path = manifest.executed(key)
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def cell(text: str) -> str:
    """Escapes a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
