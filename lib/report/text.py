"""Sentences that carry numbers: written by a cell from records, never typed into prose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import pandas as pd
from IPython.display import Markdown

from ..verdicts import COUNTED
from ..verdicts.claims import Verdict
from .tables import Table, table

# the caption of every table of verdicts
RULE = "Verdicts by one rule: an order needs three seeds, and an interval that lies on one side."

__all__ = ["RULE", "answer", "gaps", "say", "verdicts"]


def gaps(records: dict[str, list], command: str) -> str:
    """A sentence for a caption: which command fills the records that are absent; nothing if all are
    there."""
    absent = sum(record is None for group in records.values() for record in group)
    total = sum(len(group) for group in records.values())
    return f" {absent} of {total} records are not there yet; filled by: {command}" if absent else ""


def say(*sentences: str) -> Markdown:
    """Sentences as one paragraph of the page. Pass f-strings over records; Markdown works inside."""
    return Markdown(" ".join(sentences))


def verdicts(
    found: Iterable[Verdict],
    caption: str = RULE,
) -> Table:
    """A table of claims: what was claimed, the verdict, the numbers behind it."""
    rows = [(v.claim, v.verdict, v.text) for v in found]
    return table(
        pd.DataFrame(rows, columns=["claim", "verdict", "in our records"]), caption, wrap=True
    )


def answer(found: Iterable[Verdict], source: str = "Reproduced") -> Markdown:
    """The claims of a page by verdict, as a list for its head. source: what the records are; taken
    off the claims.

    What is decided comes one claim a line with its interval, the rest in one line a verdict. The
    claims go with the list as data, which the page of all verdicts reads (`lib.pages.ledger`).
    """
    told: dict[str, list[Verdict]] = {verdict: [] for verdict in COUNTED}
    found = [replace(v, claim=v.claim.removeprefix(f"{source}: ")) for v in found]
    data = {"source": source, "claims": [asdict(v) for v in found]}
    for v in found:
        told[v.verdict].append(v)
    if not any(claims for verdict, claims in told.items() if verdict != "not tested"):
        return Markdown(
            f"**{source}, in short.** None of this page's {len(told['not tested'])} claims has its records yet.",
            metadata=data,
        )
    lines = [
        f"- *{name.capitalize()}:* {v.claim}: {v.text.partition(';')[0]}"
        for name in ("holds", "does not hold")
        for v in told[name]
    ]
    if told["undecided"]:
        lines.append(f"- *Undecided:* {'; '.join(v.claim for v in told['undecided'])}.")
    if told["not tested"]:
        lines.append(
            f"- *Not tested* for want of records: {len(told['not tested'])} of {len(found)} claims."
        )
    return Markdown(
        "\n".join(
            [
                f"**{source}, in short.** The table of verdicts below has all the numbers.",
                "",
                *lines,
            ]
        ),
        metadata=data,
    )
