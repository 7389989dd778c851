"""Writes sentences that carry numbers: a cell makes them from records, prose never holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import pandas as pd
from IPython.display import Markdown

from ..verdicts import DECIDED, WORDS
from ..verdicts.claims import Verdict
from .tables import Table, table

# the caption of every table of verdicts
RULE = "Verdicts by one rule: an order needs three seeds, and an interval that lies on one side."

__all__ = ["RULE", "answer", "gaps", "say", "verdicts"]


def gaps(records: dict[str, list], command: str) -> str:
    """Says in a sentence for a caption which command fills absent records; "" if all are there."""
    wanted = [record for records_of_arm in records.values() for record in records_of_arm]
    absent, total = sum(record is None for record in wanted), len(wanted)
    return f" {absent} of {total} records are not there yet; filled by: {command}" if absent else ""


def say(*sentences: str) -> Markdown:
    """Puts sentences into one paragraph of the page; Markdown works inside.

    Pass f-strings over records.
    """
    return Markdown(" ".join(sentences))


def verdicts(judged: Iterable[Verdict], caption: str = RULE) -> Table:
    """Makes a table of claims: what was claimed, the verdict, the numbers behind it."""
    rows = [(v.claim, v.verdict, v.text) for v in judged]
    frame = pd.DataFrame(rows, columns=["claim", "verdict", "in our records"])
    return table(frame, caption, wrap=True)


def answer(judged: Iterable[Verdict], source: str = "Reproduced") -> Markdown:
    """Lists the claims of a page by verdict, for its head.

    source: what the records are; taken off the beginning of the claims. What is decided comes one
    claim a line with its interval, the rest in one line a verdict. The claims go with the list as
    data, which the page of all verdicts reads (`lib.pages.ledger`).
    """
    judged = [replace(v, claim=v.claim.removeprefix(f"{source}: ")) for v in judged]
    data = {"source": source, "claims": [asdict(v) for v in judged]}
    by_verdict = {verdict: [v for v in judged if v.verdict == verdict] for verdict in WORDS}
    untested = len(by_verdict["not tested"])
    if untested == len(judged):
        return Markdown(
            f"**{source}, in short.** None of this page's {untested} claims has its records yet.",
            metadata=data,
        )
    lines = [f"**{source}, in short.** The table of verdicts below has all the numbers.", ""]
    for verdict in DECIDED:
        for v in by_verdict[verdict]:
            lines.append(f"- *{verdict.capitalize()}:* {v.claim}: {v.text.partition(';')[0]}")
    if by_verdict["undecided"]:
        lines.append(f"- *Undecided:* {'; '.join(v.claim for v in by_verdict['undecided'])}.")
    if untested:
        lines.append(f"- *Not tested* for want of records: {untested} of {len(judged)} claims.")
    return Markdown("\n".join(lines), metadata=data)
