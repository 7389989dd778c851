"""The page of coverage: each table and figure of the documents, and how much of it is in the book.

What a document has is listed in `data/papers` (`lib.verdicts.items`). How many cells are filled is
counted from the store: a cell is an arm of the published profile, filled by one finished record.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..spec import RunSpec
from ..verdicts import items
from ..verdicts.papers import load
from . import all_verdicts, profiles

if TYPE_CHECKING:
    from ..runs.store import Record

Grid = dict[str, list[RunSpec]]


@dataclass(frozen=True)
class Covered:
    """Holds a table or figure with the number of its cells, and of those that are filled."""

    item: items.Item
    cells: int
    filled: int

    @property
    def state(self) -> str:
        """Returns whole, partly or absent."""
        return self.item.state(self.cells, self.filled)


def covered(study: str) -> list[Covered]:
    """Counts the cells of each table and figure of a document."""
    # a page has several, and its plan is read from its notebook
    planned = functools.cache(functools.partial(profiles.plan, name=profiles.PUBLISHED))
    return [_counted(item, planned) for item in items.of_study(study)]


def _counted(item: items.Item, planned: Callable[[str], Grid]) -> Covered:
    """planned: from the key of a notebook to its runs."""
    if not item.arms:
        return Covered(item, 0, 0)
    runs = planned(item.runs_page)
    arms = item.arms_among(runs)
    return Covered(item, len(arms), sum(any(map(has_record, runs[arm])) for arm in arms))


def record_of(spec: RunSpec) -> Record | None:
    """Returns the record that the reproduced side of a page has of a run, on its device or on the
    CPU."""
    from ..runs.store import store  # numpy, which planning and an import of the build do without

    records = (store().peek(run) for run in dict.fromkeys((spec.id, spec.on("cpu").id)))
    return next((record for record in records if record and record.status == "ok"), None)


def has_record(spec: RunSpec) -> bool:
    """Says whether the reproduced side of a page has the run."""
    return record_of(spec) is not None


def page(keys: Sequence[str]) -> str:
    """Writes the generated part of the page, Markdown: the state, and a table for each document."""
    documents = {study: covered(study) for study in all_verdicts.in_order(items.studies(), keys)}
    lines = [state_of(row for rows in documents.values() for row in rows), ""]
    for study, rows in documents.items():
        paper = load(study)["paper"]
        lines += [
            f"## {paper.get('short', study)}",
            "",
            f"*{paper['title']}.* {state_of(rows)}",
            "",
            "| table or figure | here, cells filled | what differs, what is missing |",
            "| --- " * 3 + "|",
            *map(_line, rows),
            "",
        ]
    return "\n".join(lines)


def state_of(rows: Iterable[Covered]) -> str:
    """Says how many tables and figures are whole, partly there and absent."""
    count = Counter(row.state for row in rows)
    counted = ", ".join(f"{count[state]} **{state}**" for state in items.STATES)
    return f"{count.total()} tables and figures: {counted}."


def _line(row: Covered) -> str:
    item = row.item
    name = f"{{ref}}`{item.name} <{item.anchor}>`" if item.page else item.name
    counted = f", {row.filled}&nbsp;of&nbsp;{row.cells}" if row.cells else ""
    notes = [item.differs, item.lacks and f"*Missing:* {item.lacks}"]
    cells = (f"{name}: {item.what}", row.state + counted, " ".join(filter(None, notes)))
    return f"| {' | '.join(map(all_verdicts.cell, cells))} |"
