"""RunSpec -> Record, and `collect`, which computes only what is not there.

    records = collect({"dense": [spec], "moe": [spec_a, spec_b]})  # computes what the store lacks
    records = load({...})  # never computes; None where a record is absent

With `executor` (anything with `submit`, such as a process pool or the executor of a Dask client)
runs go to its workers; only the calling process writes records. Parents of runs (`init`) are
computed first.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, as_completed
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .. import paths
from ..spec import RunSpec
from . import locks, states
from .checks import check, check_device
from .execute import execute, failed
from .index import same_data
from .processes import pool as pool  # the name that README gives it
from .store import Record, Store, store

if TYPE_CHECKING:
    from torch import nn

Grid = dict[str, list[RunSpec]]


def load(
    grid: Grid, where: Store | None = None, any_device: bool = False
) -> dict[str, list[Record | None]]:
    """Reads the records of a grid, in its order, None where there is none. Never computes.

    any_device: a run for a graphics card that has no finished record may have one of the same run
    on the CPU, which then stands for it; the record's spec says so. Raises ValueError for what is
    no grid.
    """
    _check_grid(grid)
    where = where or store()

    def record(spec: RunSpec) -> Record | None:
        planned = where.get(spec)
        if not any_device or spec.device == "cpu" or (planned and where.is_done(spec.id)):
            return planned
        return where.get(spec.on("cpu")) or planned

    records = {name: [record(spec) for spec in specs] for name, specs in grid.items()}
    where.index.save()
    return records


def collect(
    grid: Grid, executor: Any = None, where: Store | None = None
) -> dict[str, list[Record]]:
    """Returns the records of a grid, in its order, and computes those that the store lacks.

    A failed record counts as absent and is tried again. Raises RuntimeError naming the runs that
    failed and why, after all others have been computed and filed; ValueError, before anything is
    computed, for what is no grid, and for a record that was made with other data than those of that
    name are now.
    """
    _check_grid(grid)
    where = where or store()
    specs = unique(spec for group in grid.values() for spec in group)
    _refuse_records_of_other_data(specs, where)
    missing = [spec for spec in specs if not where.is_done(spec.id)]
    # workers of a cluster have devices of their own
    check_its_device = getattr(executor, "check_device", check_device)
    for spec in missing:
        check(spec)
        check_its_device(spec)
    failures: list[str] = []
    bar = tqdm(total=len(missing), unit="run", desc="runs", delay=5, leave=False)
    # closed at once, not when it is forgotten: an interrupt files what is finished
    with bar, contextlib.closing(with_parents(missing, executor, where)) as records:
        for record in records:
            if record.status == "failed":
                failures.append(failure(record))
            bar.update(any(record.id == spec.id for spec in missing))
    if failures:
        raise RuntimeError(
            "\n".join(failures) + f"\nRuns that failed: {len(failures)}. They are filed as failed "
            "records, and are tried again next time."
        )
    for spec in specs:
        if spec.publish:
            where.publish(spec)
    records = {name: [where.get(spec) for spec in group] for name, group in grid.items()}
    where.index.save()
    return records


def _check_grid(grid: Any) -> None:
    """Raises ValueError for what is no {name: [specs]}."""
    groups = grid.values() if isinstance(grid, Mapping) else [grid]
    for group in groups:
        listed = isinstance(group, Collection) and not isinstance(group, str | Mapping)
        if grid is group or not listed or not all(isinstance(spec, RunSpec) for spec in group):
            raise ValueError(
                f"a grid has a {type(group).__name__} where a list of specs is to be: give "
                '{"name": [spec, ...]}, a list of RunSpecs for each name'
            )


def _refuse_records_of_other_data(specs: Iterable[RunSpec], where: Store) -> None:
    """Raises ValueError for the record of a run, or of one that it starts from, whose data set has
    another fingerprint now.

    What cannot be compared passes: a record without fingerprint, a data set that is not here.
    """
    from ..inputs import fingerprint
    from ..inputs.sources import fingerprint_of

    @functools.cache  # whose files are looked at once, not once a run
    def fingerprint_now(name: str, label: str) -> dict[str, Any] | None:
        return fingerprint_of(name, label, paths.data_home())

    for spec in unique(ancestor for run in specs for ancestor in run.lineage):
        known = where.index.facts(spec.id)
        if known is not None and known[1]["data"] is None:
            continue
        record = where.peek(spec.id) if known is None else None
        if known is None and (record is None or record.content.get("data") is None):
            continue
        try:
            now = fingerprint_now(spec.data.name, spec.data.label)
        except FileNotFoundError:
            continue
        if known is not None and same_data(known[1], now):
            continue
        record = record or where.peek(spec.id)
        before = record.content["data"]
        if now and (how := fingerprint.difference(before, now)):
            raise ValueError(
                f"data set {spec.data.name} is not the one that run {spec.id} has seen: {how}. "
                f"Give the new data a name of their own, or move the record away ({record.file})"
            )


def with_parents(specs: list[RunSpec], executor: Any, where: Store) -> Iterator[Record]:
    """Computes runs that are missing, those first that they start from; yields records as they are
    filed.

    A run with `keep` whose record is there is computed again if its weights are not. A run that
    finds the weights it starts from damaged is tried once more, after those. Raises ValueError,
    before anything is computed, where one of them, or a run that it starts from, has a record of
    other data.
    """
    _refuse_records_of_other_data(specs, where)
    without_parent: list[RunSpec] = []
    for wave in _waves(specs, where):
        yield from _compute(wave, executor, where, without_parent)
    for wave in _waves(without_parent, where):
        yield from _compute(wave, executor, where)


def failure(record: Record) -> str:
    """Says in one line which run failed, and why."""
    reason = " ".join(record.error["message"].split())
    return f"run {record.id}: {record.error['kind']}: {reason}"


def status_of(spec: RunSpec, where: Store | None = None) -> str:
    """Tells whether a run is "done", "failed", "running" or "missing"."""
    where = where or store()
    if locks.is_held(where.lock(spec.id)):
        return "running"
    status = where.status(spec.id)
    return "missing" if status is None else {"ok": "done"}.get(status, "failed")


def missing_runs(grid: Grid, where: Store | None = None) -> list[RunSpec]:
    """Lists what `collect` would compute of a grid, in an order in which parents come first."""
    where = where or store()
    specs = unique(spec for group in grid.values() for spec in group)
    waves = _waves([spec for spec in specs if not where.is_done(spec.id)], where)
    return [spec for wave in waves for spec in wave]


def model_of(spec: RunSpec, where: Store | None = None) -> nn.Module:
    """Returns the model that a run leaves behind, on the CPU and in evaluation mode; the run is
    computed if its weights are not there."""
    from ..inputs.splits import load_splits
    from .restore import restored

    where = where or store()
    spec = spec.but(keep=True)
    collect({"model": [spec]}, where=where)
    try:
        state, _ = states.read(spec, where.states)
    # The record may be there without the weights, which stay in the cache of who made them.
    except (FileNotFoundError, states.DamagedWeights):
        check_device(spec)
        list(with_parents([spec], None, where))
        state, _ = states.read(spec, where.states)
    splits = load_splits(spec.data.but(test=None))
    return restored(spec, state, len(splits.class_names), splits.channels).eval()


def unique(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """Returns each id once; `keep` and `publish` hold if any of the equal specs asks for them."""
    by_id: dict[str, RunSpec] = {}
    for spec in specs:
        known = by_id.setdefault(spec.id, spec)
        if spec is not known:
            wishes = {"keep": known.keep or spec.keep, "publish": known.publish or spec.publish}
            by_id[spec.id] = known.but(**wishes)
    return list(by_id.values())


def _waves(missing: list[RunSpec], where: Store) -> list[list[RunSpec]]:
    """Runs in waves: a wave needs only weights of earlier ones. Parents enter if their weights or
    their records are not there."""
    wave_of: dict[str, tuple[int, RunSpec]] = {}

    def add(spec: RunSpec) -> int:
        wave = 0
        for needed in spec.needed_runs:
            if not where.can_be_started_from(needed.id):
                wave = max(wave, add(needed.but(keep=True)) + 1)
        known_wave, known = wave_of.get(spec.id, (0, spec))
        wishes = {"keep": spec.keep or known.keep, "publish": spec.publish or known.publish}
        wave_of[spec.id] = max(wave, known_wave), spec.but(**wishes, study=known.study)
        return wave_of[spec.id][0]

    for spec in missing:
        add(spec)
    numbers = sorted({number for number, _ in wave_of.values()})
    return [[spec for n, spec in wave_of.values() if n == number] for number in numbers]


def _compute(
    wave: list[RunSpec],
    executor: Any,
    where: Store,
    without_parent: list[RunSpec] | None = None,
) -> Iterator[Record]:
    """Yields the records of one wave, as they are filed. Runs that a pool of this machine has lost
    with a worker are computed by the calling process.

    without_parent: takes the runs that found the weights they start from damaged; None files them
    as failed.
    """
    lost = wave if executor is None else []
    if executor is not None:
        with contextlib.ExitStack() as stack:
            # one order for all processes, so that no two wait for each other
            for spec in sorted(wave, key=lambda spec: spec.id):
                stack.enter_context(locks.held(where.lock(spec.id), _say_waiting(spec)))
            unfiled = [spec for spec in wave if not _filed(spec, where)]
            jobs, lost = _submitted(unfiled, executor, where)
            results = stack.enter_context(contextlib.closing(_results(jobs, lost, where)))
            for spec, result in results:
                if without_parent is not None and _has_damaged_parent(result[0]):
                    without_parent.append(spec)
                else:
                    yield file_record(*result, spec, where)
        for spec in lost:
            warnings.warn(
                f"the worker of run {spec.id} was lost; the run goes on in the calling process",
                stacklevel=2,
            )
    for spec in lost:
        with locks.held(where.lock(spec.id), _say_waiting(spec)):
            if _filed(spec, where):  # by another process, which held the lock
                yield where.get(spec)
                continue
            result = execute(spec, *_folders(spec, where))
            if without_parent is not None and _has_damaged_parent(result[0]):
                without_parent.append(spec)
            else:
                yield file_record(*result, spec, where)


def _has_damaged_parent(content: dict[str, Any]) -> bool:
    """Tells whether a run failed since the weights that it starts from were damaged."""
    error = content.get("error", {})
    return content["status"] == "failed" and error["kind"] == states.DamagedWeights.__name__


def _results(
    jobs: dict[Any, RunSpec], lost: list[RunSpec], where: Store
) -> Iterator[tuple[RunSpec, tuple[dict[str, Any], dict[str, np.ndarray]]]]:
    """Yields what `execute` returned of each run, as it comes; adds those to `lost` whose worker
    was lost with a pool of this machine. One that a cluster has lost has failed: who calls may be
    a login node, and the worker may have run out of memory.

    Broken off, by Ctrl-C for one, it files what is finished and takes back what has not begun.
    """
    waiting = dict(jobs)
    try:
        for job in _completed(jobs):
            spec, result = jobs[job], None
            try:
                result = job.result()
            except BrokenExecutor:  # a pool of this machine
                lost.append(spec)
            # execute returns its failures, so this one is the worker's: a cluster has tried others
            except Exception as error:
                result = failed(spec, error)
            if result is not None:
                yield spec, result
            del waiting[job]  # an interrupt before here, while it is filed, files it below
    except BaseException:
        for job in (job for job in waiting if isinstance(job, Future)):
            job.cancel()
        for job, spec in waiting.items():
            if isinstance(job, Future) and job.done() and not job.cancelled():
                if job.exception() is None and not _has_damaged_parent(job.result()[0]):
                    file_record(*job.result(), spec, where)
        raise


def _submitted(
    specs: list[RunSpec], executor: Any, where: Store
) -> tuple[dict[Any, RunSpec], list[RunSpec]]:
    """{job: run}, and the runs that a pool which lost a worker did not take any more."""
    jobs, lost = {}, []
    for spec in specs:
        try:
            job = executor.submit(execute, spec, *_folders(spec, where))
        except BrokenExecutor:
            lost.append(spec)
        else:
            jobs[job] = spec
    return jobs, lost


def _completed(jobs: dict[Any, RunSpec]) -> Iterable[Any]:
    """Futures as they finish; other kinds than the standard library's (Dask's) are waited for in
    order."""
    if all(isinstance(job, Future) for job in jobs):
        yield from as_completed(jobs)
    else:
        yield from jobs


def _folders(spec: RunSpec, where: Store) -> tuple[str, str]:
    """Where `execute` finds the weights of parents, and the checkpoint of the run."""
    return str(where.states), str(where.checkpoint(spec.id))


def _say_waiting(spec: RunSpec) -> Callable[[], None]:
    return lambda: tqdm.write(
        f"run {spec.id} is being computed by another process: waiting for it", file=sys.stderr
    )


def _filed(spec: RunSpec, where: Store) -> bool:
    """Whether the record is there, and the weights where they are to be kept."""
    return where.can_be_started_from(spec.id) if spec.keep else where.is_done(spec.id)


def file_record(
    content: dict[str, Any], arrays: dict[str, np.ndarray], spec: RunSpec, where: Store
) -> Record:
    """Files a record. Once a finished run is filed its checkpoint goes, and with it what a killed
    write left beside.

    A child says whether its parent had been rebuilt with other weights than those of the parent's
    record.
    """
    parent = where.peek(spec.init.id) if spec.init is not None else None
    if content["status"] == "ok" and parent is not None and parent.status == "ok":
        weights = content["weights"]
        weights["parent_differs"] = weights.get("parent") != parent.weights["final"]
        if weights["parent_differs"]:
            _warn_of_unverified(spec, where)
    record = where.put(content, arrays, spec)
    if record.status == "ok":
        for file in where.checkpoint(spec.id).parent.glob(f"*{spec.id}.pt*"):
            file.unlink(missing_ok=True)
    return record


def _warn_of_unverified(child: RunSpec, where: Store) -> None:
    """Warns where weights that differ from those of their record have no checksum of their own:
    nobody can tell whether they were rebuilt or damaged."""
    file = where.state(child.init.id)
    if states.lacks_sha256(file):
        warnings.warn(
            f"run {child.id} starts from weights ({file}) that differ from those of their record "
            "and have no SHA-256 of their own: rebuilt on another machine, or damaged. Remove the "
            "file to have them computed again",
            stacklevel=3,
        )
