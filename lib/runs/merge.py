"""Files the records that packed runs brought back where `collect` would have filed them."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..spec import RunSpec
from .collect import Grid, file_record, status_of
from .record_files import PLANNED, Damaged, read
from .store import Record, Store, store


class Merged(NamedTuple):
    """Holds ids of the runs whose records were filed, ids of those still missing, and what was
    refused: a sentence each, with the file and the reason."""

    filed: list[str]
    missing: list[str]
    refused: list[str]


def merge(files: Sequence[Path], plan: Grid, where: Store | None = None) -> Merged:
    """Files the records of some bundles, and says what it refuses.

    plan: the runs of all pages. Missing are those that were packed and have no record. Refused are
    a bundle or a record that is damaged, and records of runs that neither the plan holds nor a run
    of the plan needs; all others are filed. Raises ValueError, before anything is filed, for a file
    that is not there or is no bundle.
    """
    where = where or store()
    specs = _with_parents(spec for group in plan.values() for spec in group)
    with tempfile.TemporaryDirectory() as scratch:
        records: dict[str, Record] = {}
        packed: set[str] = set()
        refused: list[str] = []
        for number, file in enumerate(files):
            try:
                members = read(file)
            except Damaged as error:
                refused.append(f"{error}. Nothing of it is filed")
                continue
            packed |= set(json.loads(members.pop(PLANNED, b"[]")))
            sound, faults = _checked(members, file, specs, Path(scratch) / str(number))
            records |= sound
            refused += faults
        filed = [run for run in specs if run in records]  # parents first
        for run in filed:
            _file(records[run], specs[run], where)
    missing = [run for run in specs if run in packed and status_of(specs[run], where) != "done"]
    return Merged(filed, missing, refused)


def _with_parents(specs: Iterable[RunSpec]) -> dict[str, RunSpec]:
    """The runs by id and those that they start from, parents first; published if any wants it."""
    by_id: dict[str, RunSpec] = {}

    def add(spec: RunSpec) -> None:
        for needed in spec.needed_runs:
            add(needed)
        known = by_id.setdefault(spec.id, spec)
        if spec.publish and not known.publish:
            by_id[spec.id] = known.but(publish=True)

    for spec in specs:
        add(spec)
    return by_id


def _checked(
    members: dict[str, bytes], file: Path, specs: dict[str, RunSpec], scratch: Path
) -> tuple[dict[str, Record], list[str]]:
    """Unpacks the records of a bundle to a store of their own, which checks them as any other.

    Returns those that are sound and planned, by id, and what is wrong with the others.
    """
    bundled = Store(scratch / "published", scratch)
    folder = scratch / "records" / file.stem
    folder.mkdir(parents=True)
    records, refused, runs = {}, [], set()
    for name, data in members.items():
        if re.fullmatch(r"[0-9a-f]{16}\.(json|npz)", name):
            (folder / name).write_bytes(data)
            runs.add(Path(name).stem)
        else:
            refused.append(f"{file} holds {name!r}, which is no file of a record: pack again")
    if unplanned := sorted(runs - specs.keys()):
        refused.append(
            f"{file} holds runs that no page of this profile plans: {', '.join(unplanned)}. Give "
            "the --profile that packed them, or pack again if the pages have changed since"
        )
    for run in sorted(runs & specs.keys()):
        with warnings.catch_warnings(record=True) as damage:
            warnings.simplefilter("always")
            record = bundled.peek(run)
        if record is None or record.spec.id != run or record.status != "ok":
            reason = "it is not the record of a finished run"
            if damage:  # the store goes on to say where it moved it: a folder that is gone by then
                reason = str(damage[0].message).partition(";")[0]
            refused.append(
                f"{file}, run {run}: {reason}. Nothing of it is filed: copy the file again, or let "
                "the run be computed there anew"
            )
        else:
            records[run] = record
    return records, refused


def _file(record: Record, spec: RunSpec, where: Store) -> None:
    """Files one record as if the run had been computed here, under the study that packed it."""
    spec = spec.but(study=record.spec.study)
    arrays = record.arrays if "arrays" in record.content else {}
    made_by_store = ("arrays", "checksum")
    content = {name: value for name, value in record.content.items() if name not in made_by_store}
    content["spec"] = spec.model_dump(mode="json")
    # of the parent's record there; filing compares with the one here
    content["weights"] = {k: v for k, v in record.weights.items() if k != "parent_differs"}
    file_record(content, arrays, spec, where)
    if spec.publish:
        where.publish(spec)
