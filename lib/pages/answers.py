"""Sentences that answer a question by the verdict on a claim: of the front page, and at the head of
each page.

Those of a page stand beside the claims, under `answers` in a file of `data/papers`: by page and by
one to three of its claims, a sentence for each outcome. "holds", "fails" (not reproduced or
opposite) and "open" (undecided) are there; "opposite" may have one of its own. The sentence must be
true whenever it is shown: a claim that one is better fails also where they are equal. `{ours}`
becomes the id, the verdict and the numbers, of a joint claim those of the part that decides it,
with the data where they stand in for others. A claim without records is answered by nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..verdicts import ledger, papers
from . import datasets, parameters, verdict_table

if TYPE_CHECKING:
    from ..verdicts.claims import Verdict


def outcome(verdict: str | None, stands: bool = True) -> str:
    """Says whether a claim holds, fails or is open, as sentences name it.

    stands: whether it does so after the correction for many claims as well. One that is opposite
    alone fails still: its size is excluded.
    """
    if verdict in (None, "undecided", "not tested"):
        return "open"
    if verdict.startswith("holds"):
        return "holds" if stands else "open"
    return "fails"


def sentence(words: Mapping[str, str], verdict: str | None, stands: bool = True) -> str | None:
    """Chooses the sentence for a verdict; None where there is none.

    words: sentences by outcome. What is opposite after the correction, or holds alone and not after
    it, may have one of its own ("opposite", "alone").
    """
    special = verdict if stands else "alone" if (verdict or "").startswith("holds") else None
    return words.get(special) or words.get(outcome(verdict, stands))


def title(key: str) -> str:
    """Reads the title of a page, the first line of its notebook."""
    first = json.loads(parameters.source(key).read_text(encoding="utf-8"))["cells"][0]["source"]
    return "".join(first).partition("\n")[0].removeprefix("# ")


def _words(key: str) -> dict[str, dict[str, str]]:
    """Reads the sentences of a page, by claim and outcome; none for a page that has none."""
    study = key.partition("/")[0]
    return papers.load(study).get("answers", {}).get(key, {}) if study in papers.names() else {}


def of_page(
    key: str, judged: Sequence[Verdict], data: Callable[[Verdict], str]
) -> tuple[list[str], set[str]]:
    """Answers the title of a page; returns the sentences, and the claims that they speak of.

    judged: the verdicts of the page. data: names those on which a verdict stands where they stand
    in for others, else ""; said once. Raises ValueError for a sentence on a claim of another page.
    """
    from ..report import text

    verdicts = {verdict.id: verdict for verdict in judged}
    sentences, spoken_of, said = [], set(), {""}
    for claim, words in _words(key).items():
        if claim not in verdicts:
            raise ValueError(
                f"data/papers/{key.partition('/')[0]}.yaml answers {key} by claim {claim}, which "
                f"that page does not judge: it judges {', '.join(verdicts)}"
            )
        verdict = verdicts[claim]
        chosen = sentence(words, verdict.verdict)
        decisive = verdict.decisive or verdict
        if chosen is None or decisive.estimate is None:
            continue
        on = data(decisive)
        numbers = text.paper(decisive.entry) + text.numbers(decisive)
        ours = _behind(decisive.entry, claim, decisive.word, numbers, "" if on in said else on)
        sentences.append(chosen.format(ours=ours))
        spoken_of |= {claim, decisive.id}
        said.add(on)
    # a joint claim is settled by the part that decides it, and by no other
    settled = {v.id for v in judged if v.decisive is not None and v.decisive.id in spoken_of}
    return sentences, spoken_of | settled


def _behind(entry: ledger.Claim, claim: str, word: str, numbers: str, on: str) -> str:
    """Writes what stands behind a sentence: id, statement where it is a part of the claim that is
    answered, verdict, numbers and data.

    entry: of the claim with the numbers. claim: id of the one that is answered.
    """
    stated = "" if entry.id == claim else f' "{entry.statement.removesuffix(".")}"'
    return f"{entry.id}{stated}, *{word}*: {numbers}{f', on {on}' if on else ''}"


def of_rows(key: str, listed: Iterable[Mapping[str, Any]]) -> str:
    """Asks what the title of a page does, and answers it from the rows of all verdicts.

    Unlike on the page itself, what holds alone and not after the correction for many claims is
    open. listed: of `all_verdicts.rows`. Returns Markdown in a line.
    """
    from ..report import text
    from .all_verdicts import stands

    rows, entries = {row["id"]: row for row in listed}, ledger.claims()
    sentences, said = [], {""}
    for claim, words in _words(key).items():
        row = rows[claim]
        decisive = rows[row["decisive"] or claim]
        chosen = sentence(words, row["verdict"], stands(row))
        if chosen is None or decisive["effect"] is None:
            continue
        on = "; ".join(datasets.shown(decisive, []))
        entry, word = entries[decisive["id"]], verdict_table.word_of(decisive)
        word += " (pilot)" if decisive["pilot"] else ""
        numbers = text.paper(entry) + decisive["text"].partition("; ")[0]
        ours = _behind(entry, claim, word, numbers, "" if on in said else on)
        sentences.append(chosen.format(ours=ours))
        said.add(on)
    return " ".join([f"*{title(key)}*", *(sentences or ["No records yet."])])
