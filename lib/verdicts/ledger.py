"""Reads the ledger: every claim of every document, and this book's own, from `data/papers`.

An entry of `claims` in a file of `data/papers` says what is claimed, how large it was published,
and on which runs it is judged, before it is judged. A page names a claim by its id and adds only
the records. Form of an entry:

- `id`, `statement` (in our words), `source` (table, figure or section of the document)
- `kind: ours` for a control of this book
- `direction`: greater, less, equal, not worse, or joint with `parts`, entries of their own
- `published`: the printed size in `unit` (default points), above 0; or where it stands: {table,
  column, of: {column: value}, than: {column: value}}, the cell of one row less that of another
- `smallest`: the smallest effect that counts, half of the band of an equality; by default the
  published size, needed where none is printed, and refused beside one of greater and less, which
  are judged by the published size alone
- `statistic`: the number that is judged; by default test top-1 of the first arm less the second's
- `threshold`: what that number is held against, in `unit`; by default 0, as for any difference
- `page` that judges it, the `runs` page that plans its runs (by default the same), and `arms`: the
  names of these runs there
- `seeds`: [3] for a pilot whose second stage is open, [3, 8] once it is fixed, a number where all
  seeds were planned at once; 1 for what is counted and has no chance in it
- `scale`: on what the document has it, where its profile (`paper`) runs other data
- `headline: true` for what the page of all verdicts shows first
- `reason` in place of all that: why it cannot be tested here
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .. import paths
from . import papers

__all__ = [
    "Cell",
    "Claim",
    "claims",
    "judged_on",
    "of_page",
    "of_study",
    "on_runs_of",
    "studies",
]

PILOT = 3  # seeds
TOP1 = "test top-1, the first less the second"
# what the parts of a joint claim have from it
OF_PARTS = (
    "source",
    "kind",
    "page",
    "runs",
    "unit",
    "statistic",
    "threshold",
    "seeds",
    "arms",
    "smallest",
    "scale",
)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Entry):
    """Names a published size: a cell of a printed table less another one of the same column."""

    table: str
    column: str
    of: dict[str, Any]
    than: dict[str, Any] | None = None  # None: the cell itself

    def size(self, study: str) -> float:
        """Returns the size as it is printed; raises ValueError unless each row is there once."""
        frame = papers.table(study, self.table)
        value = self._value(frame, self.of)
        # printed values have few digits, their binary difference has many
        return value if self.than is None else round(value - self._value(frame, self.than), 6)

    def _value(self, frame: Any, wanted: dict[str, Any]) -> float:
        rows = frame
        for column, value in wanted.items():
            rows = rows[rows[column].isna() if value is None else rows[column] == value]
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} rows of {self.table} are {wanted}: name one")
        return float(rows[self.column].iloc[0])


class Claim(_Entry):
    """Holds an entry of the ledger; see the module.

    study: the name of its file. part_of: the id of the joint claim that it is a part of.
    """

    id: str
    study: str
    statement: str
    source: str
    kind: Literal["document", "ours"] = "document"
    direction: Literal["greater", "less", "equal", "not worse", "joint"] | None = None
    published: Annotated[float, Field(gt=0)] | Cell | None = None
    smallest: Annotated[float, Field(gt=0)] | None = None
    unit: str = "points"
    statistic: str = TOP1
    threshold: float = 0.0
    page: str | None = None
    runs: str | None = None
    arms: tuple[str, ...] = ()
    seeds: int | tuple[int, ...] = (PILOT,)
    scale: str | None = None
    headline: bool = False
    reason: str | None = None
    part_of: str | None = None
    parts: tuple[Claim, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Claim:
        if self.reason is not None:
            if self.page or self.direction or self.parts:
                raise ValueError("an entry with a reason is not judged: give no page and direction")
            return self
        if self.page is None or self.direction is None:
            raise ValueError("give `page` and `direction`, or the `reason` why it is not tested")
        if (self.direction == "joint") != bool(self.parts):
            raise ValueError("`parts` go with direction joint, and direction joint with `parts`")
        if not self.parts and self.published is None and self.smallest is None:
            raise ValueError("give the `published` size, or the `smallest` effect that counts")
        both = self.published is not None and self.smallest is not None
        if both and self.direction in ("greater", "less"):
            raise ValueError(
                f"direction {self.direction} is judged by one size: give `published` where the "
                "document prints it, else `smallest`; both go with equal and not worse, whose band "
                "is `smallest`"
            )
        stages = (self.seeds,) if isinstance(self.seeds, int) else self.seeds
        if not 1 <= len(stages) <= 2 or list(stages) != sorted(stages) or stages[0] < 1:
            raise ValueError(f"seeds={self.seeds}: give [pilot], [pilot, all] or a number")
        return self

    @property
    def published_size(self) -> float | None:
        """Returns the printed size in the claimed direction, in `unit`; None where none is."""
        if isinstance(self.published, Cell):
            size = self.published.size(self.study)
            return -size if self.direction == "less" else size
        return self.published

    @property
    def is_derived(self) -> bool:
        """Says whether the published size was computed from what is printed, such as shapes."""
        if not isinstance(self.published, Cell):
            return False
        table = papers.table(self.study, self.published.table)
        return table.attrs.get("confidence") == "derived"

    @property
    def size(self) -> float | None:
        """Returns the smallest effect that counts, in `unit`; None of a joint claim."""
        if self.parts:
            return None
        return self.smallest if self.smallest is not None else self.published_size

    @property
    def decimals(self) -> int:
        """Returns the decimals that show a tenth of the smallest effect, one at least."""
        return max(1, 1 - math.floor(math.log10(self.size)))

    @property
    def measured(self) -> str:
        """Returns the number that is judged, and what it is held against, where it is not test
        top-1; "" of a joint claim."""
        if self.parts or self.statistic == TOP1:
            return ""
        held_against = f", held against {self.threshold:g}" if self.threshold else ""
        return self.statistic + held_against

    @property
    def planned_seeds(self) -> int:
        """Returns the number of seeds of its last stage."""
        return self.seeds if isinstance(self.seeds, int) else self.seeds[-1]

    @property
    def runs_page(self) -> str | None:
        """Returns the key of the notebook that plans its runs."""
        return self.runs or self.page

    def is_pilot(self, n: int) -> bool:
        """Says whether a verdict on n seeds is that of a pilot: further seeds are planned, or
        nobody has said yet how many."""
        is_open = not isinstance(self.seeds, int) and len(self.seeds) == 1
        return is_open or n < self.planned_seeds

    def judged(self) -> Iterator[Claim]:
        """Yields what is judged on records of its own: the claim, or the parts of a joint one."""
        if self.reason is None:
            yield from self.parts or (self,)


def studies() -> list[str]:
    """Lists the studies that have claims."""
    return [path.stem for path in sorted(paths.PAPERS.glob("*.yaml")) if of_study(path.stem)]


def of_study(study: str) -> tuple[Claim, ...]:
    """Returns the claims of a study in their order, joint ones without their parts."""
    path = paths.PAPERS / f"{study}.yaml"
    # a file that changes is read again: tests and live notebooks change them
    stamp = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    return _read(study, path, stamp) if stamp else ()


def of_page(key: str) -> list[Claim]:
    """Lists the claims that a page judges, joint ones without their parts."""
    return [claim for claim in _around(key) if claim.page == key]


def judged_on(key: str) -> list[Claim]:
    """Lists what a page judges on records of their own: claims, and the parts of joint ones."""
    return [part for claim in of_page(key) for part in claim.judged()]


def on_runs_of(key: str) -> list[Claim]:
    """Lists the claims and parts that are judged on the runs of a page."""
    listed = (part for claim in _around(key) for part in claim.judged())
    return [claim for claim in listed if claim.runs_page == key and claim.arms]


def claims() -> dict[str, Claim]:
    """Returns all claims and parts by their ids. Raises ValueError for an id that comes twice."""
    by_id: dict[str, Claim] = {}
    for study in studies():
        for claim in (c for whole in of_study(study) for c in (whole, *whole.parts)):
            if claim.id in by_id:
                raise ValueError(
                    f"claim {claim.id} is in the ledger twice: in data/papers/"
                    f"{by_id[claim.id].study}.yaml and {study}.yaml"
                )
            by_id[claim.id] = claim
    return by_id


def _around(key: str) -> Iterator[Claim]:
    """Yields the claims among which those of a page are: of its own study, if it has some.

    A page that reads no other file is not stale when another file changes.
    """
    own = of_study(key.split("/")[0])
    yield from own or (claim for study in studies() for claim in of_study(study))


@functools.lru_cache(maxsize=32)
def _read(study: str, path: Path, stamp: tuple[int, int]) -> tuple[Claim, ...]:
    entries = papers.read(path).get("claims") or []
    return tuple(_claim(study, entry) for entry in entries)


def _claim(study: str, entry: dict[str, Any]) -> Claim:
    """Makes an entry a claim; its parts have what they share with it, unless they say another."""
    shared = {name: entry[name] for name in OF_PARTS if name in entry}
    fields = entry | {"study": study}
    if "parts" in entry:
        of_whole = shared | {"study": study, "part_of": entry.get("id")}
        fields["parts"] = [of_whole | part for part in entry["parts"]]
    try:
        return Claim(**fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"data/papers/{study}.yaml, claim {entry.get('id')}: {problems}") from None
