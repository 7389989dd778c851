"""Writes sentences that carry numbers: a cell makes them from records, prose never holds them."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
from IPython.display import Markdown

from ..verdicts import DECIDED, MARKS, WORDS, agree, count
from ..verdicts.claims import Verdict, amount
from ..verdicts.stats import accuracy_interval, finished
from ..verdicts.values import largest_class
from . import NOT_YET
from .tables import Table, table

if TYPE_CHECKING:
    from ..verdicts.ledger import Claim

# the caption of every table of verdicts
RULE = (
    "Verdicts by one rule: an order needs three seeds; it holds if the interval lies on the "
    "claimed side, is opposite if it lies on the other, and is not reproduced if it has zero "
    "inside and the published size outside. That two are equal holds if the interval lies within "
    "the size that counts on both sides, and is not reproduced if it lies beyond; that one is not "
    "worse asks for the lower end only. The size that counts is the published one, or, where none "
    "is printed and for the last two, the one that stands in the row. Of a number that is held "
    "against another, its difference from that is judged."
)

# for captions of tables with differences between runs
ALONE = (
    "The interval of a difference is made of that difference alone. A verdict's is moderated where "
    "its page has comparisons enough: by the variance between seeds of all of them, so the same "
    "difference may have a wider or a narrower one there."
)

HEAD = 3  # sentences that answer a page and claims that its head lists below them, together

__all__ = [
    "ALONE",
    "HEAD",
    "RULE",
    "agree",
    "answer",
    "boxed",
    "count",
    "floor",
    "gaps",
    "paper",
    "published",
    "say",
    "verdicts",
]


def gaps(records: dict[str, list]) -> str:
    """Says in a sentence for a caption how many records are absent; "" if all are there."""
    wanted = [record for records_of_arm in records.values() for record in records_of_arm]
    absent, total = sum(record is None for record in wanted), len(wanted)
    if not absent:
        return ""
    share = "1 record" if total == 1 else f"{absent} of {total} records"
    return f" {share} {agree('are', absent, total)} {NOT_YET}."


def floor(records_of_arm: Mapping[str, Sequence[Any]]) -> str:
    """Says in a sentence for a caption what one answer for all test images gets right, and which
    arms are not above it; "" without a record.

    records_of_arm: of one data set, one a seed, None = absent. An arm is judged by the interval of
    its accuracy, so one with fewer than three seeds is not named.
    """
    first = next((r for records in records_of_arm.values() for r in finished(records)), None)
    if first is None:
        return ""
    right = largest_class(first)
    tops = {arm: accuracy_interval(records) for arm, records in records_of_arm.items()}
    level = [arm for arm, top in tops.items() if top and top.low is not None and top.low <= right]
    arms = f"; not above that, by their intervals: {'; '.join(level)}" if level else ""
    return f" The most frequent class as the answer to all test images: {right:.1f}%{arms}."


def say(*sentences: str) -> Markdown:
    """Puts sentences into one paragraph of the page; Markdown works inside.

    Pass f-strings over records.
    """
    return Markdown(" ".join(sentences))


def verdicts(judged: Mapping[str, Iterable[Verdict]], caption: str = RULE) -> Table:
    """Makes a table of claims: what is claimed, what was published, our numbers, the verdict.

    judged: the verdicts by the source of their records, such as "reproduced".
    """
    rows = [
        (source, _with_measure(v), published(v.entry), numbers(v), v.word)
        for source, of_source in judged.items()
        for v in of_source
    ]
    columns = ["source", "claim", "published", "in our records", "verdict"]
    return table(pd.DataFrame(rows, columns=columns), caption, wrap=True)


def _with_measure(verdict: Verdict) -> str:
    """Writes a claim, and the number that is judged where it is not test accuracy."""
    measured = verdict.entry.measured if verdict.entry is not None else ""
    return f"{verdict.claim} Measured: {measured}." if measured else verdict.claim


def numbers(verdict: Verdict) -> str:
    """Returns the interval behind a verdict; of a joint claim how many of its parts hold, and that
    of the part that decides it."""
    if not verdict.parts:
        return verdict.text.partition(";")[0]
    held, decisive = parts_held([part.verdict for part in verdict.parts]), verdict.decisive
    return held if decisive is None else f"{held} ({decisive.id}: {numbers(decisive)})"


def parts_held(words: Sequence[str]) -> str:
    """Counts the verdicts on the parts of a claim: "1 of 3 parts holds; 2 not reproduced"."""
    others = Counter(word for word in words if not word.startswith("holds"))
    held = len(words) - others.total()
    if not others:
        return f"{'both' if len(words) == 2 else f'all {len(words)}'} parts hold"
    rest = "; ".join(f"{others[word]} {word}" for word in WORDS if others[word])
    hold = agree("hold", held, len(words))
    return f"{held} of {count(len(words), 'part')} {hold}; {rest}"


def published(entry: Claim | None) -> str:
    """Says what was published of a claim of the ledger; of a joint one, or None, ""."""
    if entry is None or entry.size is None:
        return ""
    size = entry.published_size
    if size is None:
        threshold = f"held against {entry.threshold:g}; " if entry.threshold else ""
        smallest = f"{threshold}smallest that counts: {amount(entry.size, entry.unit)}"
        # an equality has a band, whatever is printed
        has_none = entry.kind == "document" and entry.direction in ("greater", "less")
        return f"no size printed; {smallest}" if has_none else smallest
    sign = {"greater": "+", "less": "-"}.get(entry.direction, "")
    said = f"{sign}{size:.{entry.decimals}f} {entry.unit}".strip()
    if entry.is_derived:
        said += " (derived)"
    if entry.smallest is not None:  # a band, within which a printed zero can lie as well
        said += f", judged within {amount(entry.smallest, entry.unit)}"
    return said


def boxed(*answer: str, sure: str = "", metadata: dict[str, Any] | None = None) -> Markdown:
    """Puts the answer of a page into the box at its head; Markdown works inside.

    answer: sentences, over records. sure: how sure it is, in sentences. metadata: data that goes
    with it.
    """
    parts = [f"**Answer.** {' '.join(answer)}", f"**How sure.** {sure}" if sure else ""]
    inside = "\n\n".join(filter(None, parts))
    # empty lines around it, without which Markdown is not read inside HTML
    return Markdown(f'<div class="answer">\n\n{inside}\n\n</div>', metadata=metadata)


def answer(
    judged: Iterable[Verdict],
    source: str = "Reproduced",
    sure: str = "",
    said: Sequence[str] = (),
    spoken_of: Collection[str] = (),
) -> Markdown:
    """Puts the answer of a page into its box, lists further claims by verdict below it, HEAD
    sentences and claims in all, and counts the others.

    source: what the records are; taken off the beginning of the claims. sure: how sure it is.
    said: sentences that answer the page. spoken_of: ids of the claims that they are on, which the
    list leaves out. Headline claims come before the document's others and those before ours, and of
    each what is decided before what is not. What is decided has a line with what was published and
    our interval; parts of a joint claim stand inside its line. All claims go with the list as data,
    which the page of all verdicts reads (`lib.pages.all_verdicts`).
    """
    judged = [replace(v, claim=v.claim.removeprefix(f"{source}: ")) for v in judged]
    data = {"source": source, "claims": [_plain(v) for v in judged]}
    whole = [v for v in judged if v.entry is None or v.entry.part_of is None]
    untested = sum(v.verdict == "not tested" for v in whole)
    if untested == len(whole) and not said:
        none = f"None of this page's {untested} claims has its records yet."
        if untested == 1:
            none = "The claim of this page has no records yet."
        return boxed(none, metadata=data)
    tested = [v for v in whole if v.verdict != "not tested" and v.id not in spoken_of]
    tested.sort(key=_rank)
    room = max(HEAD - len(said), 0)
    shown = sorted(tested[:room], key=lambda v: WORDS.index(v.verdict))
    lines = [_line(v) for v in shown if v.verdict in DECIDED]
    if undecided := [_with_numbers(v) for v in shown if v.verdict == "undecided"]:
        lines.append(f"- {MARKS['undecided']} *Undecided:* {'. '.join(undecided)}.")
    others = Counter(v.verdict for v in tested[room:]) + Counter({"not tested": untested})
    if others:
        counted = "; ".join(f"{word}: {others[word]}" for word in WORDS if others[word])
        lines.append(f"- *Further claims*, below: {others.total()} ({counted}).")
    listed = ["\n\n" + "\n".join(lines)] if lines else []
    return boxed(*said, *listed, sure=sure, metadata=data)


def paper(entry: Claim | None) -> str:
    """Writes the published number of a claim before ours; "" where none is printed."""
    printed = entry is not None and entry.size is not None and entry.published_size is not None
    return f"paper {published(entry)}, ours " if printed else ""


def _line(verdict: Verdict) -> str:
    """Writes the line of a decided claim: the verdict, the claim, the paper's number and ours."""
    mark = MARKS[verdict.verdict]
    return f"- {mark} *{verdict.word.capitalize()}:* {_with_numbers(verdict)}."


def _with_numbers(verdict: Verdict) -> str:
    """Writes a claim, the paper's number and ours; a joint one with those of its deciding part."""
    if not verdict.parts:
        return f"{_sentence(verdict)}: {_paper_and_ours(verdict)}"
    held = f"{_sentence(verdict)}: {parts_held([part.verdict for part in verdict.parts])}"
    part = verdict.decisive
    if part is None:
        return held
    stated = plain(part.claim.removesuffix("."))
    return f'{held} ({part.id} "{stated}": {_paper_and_ours(part)})'


def _paper_and_ours(verdict: Verdict) -> str:
    """Writes the paper's number and ours, and of what they are where that is not clear."""
    entry = verdict.entry
    # a number without a unit, or a share, says nothing unless one knows of what it is
    bare = entry is not None and entry.unit in ("", "percent")
    measured = entry.measured.partition(";")[0] if bare else ""
    what = f" ({plain(measured)})" if measured else ""
    return f"{paper(entry)}{numbers(verdict)}{what}"


def plain(text: str) -> str:
    """Escapes a text, so that a page shows it as it is written: neither HTML nor Markdown."""
    return re.sub(r"([\\`*_\[\]|$])", r"\\\1", html.escape(text, quote=False))


def _rank(verdict: Verdict) -> tuple[bool, bool, bool]:
    """Puts headline claims first, the document's before ours, and of each what is decided first."""
    entry = verdict.entry
    ours = entry is not None and entry.kind == "ours"
    headline = entry is not None and entry.headline
    return not headline, ours, verdict.verdict not in DECIDED


def _sentence(verdict: Verdict) -> str:
    """Writes a claim inside a line, with its id."""
    claim = plain(verdict.claim.removesuffix("."))
    return f"{claim} ({verdict.id})" if verdict.id else claim


def _plain(verdict: Verdict) -> dict[str, Any]:
    """Returns a verdict as data: its numbers, without the law behind them and without its parts,
    which stand beside it."""
    numbers = asdict(replace(verdict, estimate=None, entry=None, parts=())) | {"id": verdict.id}
    numbers["decisive"] = verdict.decisive.id if verdict.decisive else None
    del numbers["entry"], numbers["parts"]
    estimate = verdict.estimate
    if estimate is None:
        return numbers | {"estimate": None}
    interval = {name: getattr(estimate, name) for name in ("mean", "low", "high", "method")}
    law = None if estimate.law is None else asdict(estimate.law)
    return numbers | {"estimate": interval | {"law": law}}
