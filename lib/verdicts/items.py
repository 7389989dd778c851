"""Reads which tables and figures each document has, and where the book has them.

They stand under `items` in a file of `data/papers`, in the order of the document. Form of an entry:

- `id`: T5 for Table 5, F7 for Figure 7, T for the one table of a document whose number is not known
- `what` it shows, in our words
- `page`: the notebook that has it, right behind the label `(STUDY-ID)=`, in lower case, of a
  Markdown cell; left out where no page has it
- `arms`: the runs that fill it, by their names in the grid of the `runs` page (by default the same)
  under the published profile, or by patterns of names (*, ?); none for what is counted or drawn
  without runs. Each such arm is a cell
- `differs`: what is another thing here than in the document
- `lacks`: what is not there, although it could be
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from . import papers

__all__ = ["STATES", "Item", "of_study", "studies"]

STATES = ("whole", "partly", "absent")
KINDS = {"T": "Table", "F": "Figure"}


class Item(BaseModel):
    """Holds an entry; see the module. study: the name of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str
    id: Annotated[str, Field(pattern=r"^([TF][1-9]\d*|T)$")]
    what: str
    page: str | None = None
    runs: str | None = None
    arms: tuple[str, ...] = ()
    differs: str | None = None
    lacks: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Item:
        if self.page is None and (self.runs or self.arms or not self.lacks):
            raise ValueError("without a `page` give `lacks`, which says why, and no runs")
        if self.runs and not self.arms:
            raise ValueError("`runs` says where the `arms` are planned: give these, too")
        return self

    @property
    def name(self) -> str:
        """Returns its name in the document, such as "Table 5"."""
        return f"{KINDS[self.id[0]]} {self.id[1:]}".strip()

    @property
    def anchor(self) -> str:
        """Returns the label in front of it on its page, such as vimoe-t5."""
        return f"{self.study}-{self.id}".lower()

    @property
    def runs_page(self) -> str | None:
        """Returns the key of the notebook that plans its runs."""
        return self.runs or self.page

    def arms_among(self, planned: Collection[str]) -> list[str]:
        """Lists the arms that fill it, of all that are planned on its `runs_page`.

        Raises ValueError for a name or pattern that fits none of them.
        """
        for pattern in self.arms:
            if not any(fnmatchcase(arm, pattern) for arm in planned):
                raise ValueError(
                    f"data/papers/{self.study}.yaml, item {self.id}: {self.runs_page} plans no "
                    f"runs called {pattern!r}; it plans {', '.join(map(repr, planned)) or 'none'}"
                )
        return [arm for arm in planned if any(fnmatchcase(arm, p) for p in self.arms)]

    def state(self, cells: int, filled: int) -> str:
        """Says how much of it is there: whole, partly or absent.

        cells: how many it has. filled: how many of them have a finished record.
        """
        if self.page is None or (cells and not filled):
            return "absent"
        return "partly" if self.lacks or filled < cells else "whole"


def studies() -> list[str]:
    """Lists the studies whose file lists tables and figures."""
    return [study for study in papers.names() if papers.load(study).get("items")]


def of_study(study: str) -> list[Item]:
    """Lists the tables and figures of a document, in its order.

    Raises ValueError for an entry of another form, and for an id that comes twice.
    """
    items = [_item(study, entry) for entry in papers.load(study).get("items") or ()]
    ids = [item.id for item in items]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"data/papers/{study}.yaml has two items {', '.join(twice)}: keep one")
    return items


def _item(study: str, entry: dict[str, Any]) -> Item:
    try:
        return Item(study=study, **entry)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"data/papers/{study}.yaml, item {entry.get('id')}: {problems}") from None
