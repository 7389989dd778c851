"""RunSpec -> Record, and `collect`, which computes only what is not there.

    records = collect({"dense": [spec], "moe": [spec_a, spec_b]})  # computes what the store lacks
    records = load({...})  # never computes; None where a record is absent

With `executor` (anything with `submit`, such as a process pool or the executor of a Dask client)
runs go to its workers; only the calling process writes records. Parents of runs (`init`) are
computed first.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .. import paths
from ..spec import BackboneSpec, MaskSpec, MoESpec, RunSpec
from . import locks
from .execute import execute, state_of
from .store import Record, Store, store

if TYPE_CHECKING:
    from torch import nn

Grid = dict[str, list[RunSpec]]


def load(
    grid: Grid, where: Store | None = None, any_device: bool = False
) -> dict[str, list[Record | None]]:
    """Reads the records of a grid, in its order, None where there is none. Never computes.

    any_device: a run for a graphics card that has no finished record may have one of the same run
    on the CPU, which then stands for it; the record's spec says so.
    """
    where = where or store()

    def record(spec: RunSpec) -> Record | None:
        planned = where.get(spec)
        if not any_device or spec.device == "cpu" or (planned and planned.status == "ok"):
            return planned
        return where.get(spec.on("cpu")) or planned

    return {name: [record(spec) for spec in specs] for name, specs in grid.items()}


def collect(
    grid: Grid, executor: Any = None, where: Store | None = None
) -> dict[str, list[Record]]:
    """Returns the records of a grid, in its order, and computes those that the store lacks.

    A failed record counts as absent and is tried again. Raises RuntimeError naming the runs that
    failed and why, after all others have been computed and filed; ValueError, before anything is
    computed, for a record that was made with other data than those of that name are now.
    """
    where = where or store()
    specs = unique(spec for group in grid.values() for spec in group)
    _refuse_records_of_other_data(specs, where)
    missing = [spec for spec in specs if not _done(where, spec)]
    for spec in missing:
        check(spec)
        _check_device(spec)
    failures: list[str] = []
    bar = tqdm(total=len(missing), unit="run", desc="runs", delay=5, leave=False)
    with bar:
        for record in with_parents(missing, executor, where):
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
    return {name: [where.get(spec) for spec in group] for name, group in grid.items()}


def _refuse_records_of_other_data(specs: Iterable[RunSpec], where: Store) -> None:
    """Raises ValueError for the record of a run, or of one that it starts from, whose data set has
    another fingerprint now.

    What cannot be compared passes: a record without fingerprint, a data set that is not here.
    """
    from ..inputs import fingerprint
    from ..inputs.sources import fingerprint_of

    for spec in unique(chain.from_iterable(map(_lineage, specs))):
        record = where.peek(spec.id)
        before = record.content.get("data") if record is not None else None
        if before is None:
            continue
        try:
            now = fingerprint_of(spec.data.name, spec.data.label, paths.data_home())
        except FileNotFoundError:
            continue
        if now and (how := fingerprint.difference(before, now)):
            raise ValueError(
                f"data set {spec.data.name} is not the one that run {spec.id} has seen: {how}. "
                f"Give the new data a name of their own, or move the record away ({record.file})"
            )


def _lineage(spec: RunSpec) -> Iterator[RunSpec]:
    """Yields a run and all that it starts from."""
    yield spec
    if spec.init is not None:
        yield from _lineage(spec.init)


def with_parents(specs: list[RunSpec], executor: Any, where: Store) -> Iterator[Record]:
    """Computes runs that are missing, those first that they start from; yields records as they are
    filed.

    A run with `keep` whose record is there is computed again if its weights are not.
    """
    for wave in _waves(specs, where):
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
    record = where.peek(spec.id)
    return "missing" if record is None else {"ok": "done"}.get(record.status, "failed")


def missing_runs(grid: Grid, where: Store | None = None) -> list[RunSpec]:
    """Lists what `collect` would compute of a grid, in an order in which parents come first."""
    where = where or store()
    specs = unique(spec for group in grid.values() for spec in group)
    waves = _waves([spec for spec in specs if not _done(where, spec)], where)
    return [spec for wave in waves for spec in wave]


def model_of(spec: RunSpec, where: Store | None = None) -> nn.Module:
    """Returns the model that a run leaves behind, on the CPU and in evaluation mode; the run is
    computed if its weights are not there."""
    from ..inputs.splits import load_splits
    from .restore import restored

    where = where or store()
    spec = spec.but(keep=True)
    collect({"model": [spec]}, where=where)
    # The record may be there without the weights, which stay in the cache of who made them.
    if not where.state(spec.id).is_file():
        _check_device(spec)
        list(with_parents([spec], None, where))
    splits = load_splits(spec.data.but(test=None))
    state = state_of(spec, where.states)
    return restored(spec, state, len(splits.class_names), splits.channels).eval()


def check(spec: RunSpec) -> None:
    """Builds the model on no device, so that what does not fit is refused before any work.

    Raises ValueError naming the field, for L beyond the depth, a patch that does not divide the
    image, an unknown backbone, a step that cannot be carried out; or naming the module, for an
    architecture whose cost cannot be counted.
    """
    from ..measure.cost import check_capacity
    from ..training import evaluate
    from .steps import steps_of

    architecture = (spec.backbone, spec.data.image_size, spec.moe)
    model = _skeleton(*architecture)
    for step in steps_of(spec):
        step.check(model, spec)
    _check_whole(*architecture, None if spec.train is None else spec.train.mask)
    if spec.moe is not None and spec.moe.capacity_factor is not None:
        trained = spec.train.batch if spec.train is not None else 0
        check_capacity(model, spec.data.image_size, max(trained, evaluate.BATCH))
    if spec.init is not None:
        check(spec.init)


# The runs of a page are hundreds, their architectures a few.
@lru_cache(maxsize=64)
def _skeleton(backbone: BackboneSpec, image_size: int, moe: MoESpec | None) -> nn.Module:
    """The backbone with its MoE layers, to look at, not to change."""
    from ..models.backbone import skeleton

    return skeleton(backbone, image_size, classes=2, moe=moe)


@lru_cache(maxsize=1024)
def _check_whole(
    backbone: BackboneSpec, image_size: int, moe: MoESpec | None, mask: MaskSpec | None
) -> None:
    """Raises ValueError if an ensemble or a masked autoencoder cannot be made of the backbone, or
    if the cost of the whole cannot be counted."""
    import torch

    from ..measure import cost
    from ..models.ensemble import ensemble
    from ..models.mae import MaskedAutoencoder

    model = copy.deepcopy(_skeleton(backbone, image_size, moe))
    if mask is not None:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            MaskedAutoencoder(model, mask)
    if moe is not None and moe.members > 1:
        model = ensemble(model, moe.members)
    cost.count(model, image_size)  # of a masked autoencoder the encoder's, as in its record


def _check_device(spec: RunSpec) -> None:
    """ValueError if a run has to be computed on a device that is not there; its record, where there
    is one, needs none."""
    import torch

    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"run {spec.id} is planned for device='cuda' and this machine has none: give "
            "device='cpu', which makes runs of their own (on a command line -p device cpu), or "
            "take a profile made for the CPU"
        )


def unique(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """Returns each id once; `keep` and `publish` hold if any of the equal specs asks for them."""
    by_id: dict[str, RunSpec] = {}
    for spec in specs:
        known = by_id.setdefault(spec.id, spec)
        if spec is not known:
            wishes = {"keep": known.keep or spec.keep, "publish": known.publish or spec.publish}
            by_id[spec.id] = known.but(**wishes)
    return list(by_id.values())


def _done(where: Store, spec: RunSpec) -> bool:
    # not a read of the page: what a page reads is its grid, when it is complete
    record = where.peek(spec.id)
    return record is not None and record.status == "ok"


def _waves(missing: list[RunSpec], where: Store) -> list[list[RunSpec]]:
    """Runs in waves: a wave needs only weights of earlier ones. Parents enter if their weights are
    not in the cache."""
    wave_of: dict[str, tuple[int, RunSpec]] = {}

    def add(spec: RunSpec) -> int:
        wave = 0
        for needed in spec.needed_runs:
            if not where.state(needed.id).is_file():
                wave = max(wave, add(needed.but(keep=True)) + 1)
        known_wave, known = wave_of.get(spec.id, (0, spec))
        wishes = {"keep": spec.keep or known.keep, "publish": spec.publish or known.publish}
        wave_of[spec.id] = max(wave, known_wave), spec.but(**wishes, study=known.study)
        return wave_of[spec.id][0]

    for spec in missing:
        add(spec)
    numbers = sorted({number for number, _ in wave_of.values()})
    return [[spec for n, spec in wave_of.values() if n == number] for number in numbers]


def _compute(wave: list[RunSpec], executor: Any, where: Store) -> Iterable[Record]:
    """The records of one wave, as they are filed. A lost worker's runs are computed by the calling
    process."""
    if executor is None:
        for spec in wave:
            yield _locked(spec, where)
        return
    with contextlib.ExitStack() as stack:
        # one order for all processes, so that no two wait for each other
        for spec in sorted(wave, key=lambda spec: spec.id):
            stack.enter_context(locks.held(where.lock(spec.id), _say_waiting(spec)))
        jobs, lost = _submitted([spec for spec in wave if not _filed(spec, where)], executor, where)
        for job in _completed(jobs):
            try:
                content, arrays = job.result()
            # execute returns its failures, so this one is the worker's: each executor has its own
            # kinds
            except Exception:
                lost.append(jobs[job])
                continue
            yield file_record(content, arrays, jobs[job], where)
    for spec in lost:
        warnings.warn(
            f"the worker of run {spec.id} was lost; the run goes on in the calling process",
            stacklevel=2,
        )
        yield _locked(spec, where)


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
    return _done(where, spec) and not (spec.keep and not where.state(spec.id).is_file())


def _locked(spec: RunSpec, where: Store) -> Record:
    """Computes under the run's lock; if another process held it, its record is read instead."""
    with locks.held(where.lock(spec.id), _say_waiting(spec)):
        if _filed(spec, where):
            return where.get(spec)
        content, arrays = execute(spec, *_folders(spec, where))
        return file_record(content, arrays, spec, where)


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
    record = where.put(content, arrays, spec)
    if record.status == "ok":
        for file in where.checkpoint(spec.id).parent.glob(f"*{spec.id}.pt*"):
            file.unlink(missing_ok=True)
    return record


def pool(workers: int | None = None) -> ProcessPoolExecutor:
    """Opens a bounded local process pool for `collect`; each worker starts clean (spawn), so torch
    threads do not collide, and ends with the process that opened the pool, however that ends."""
    return ProcessPoolExecutor(
        workers or os.cpu_count(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    )


def _end_with_parent() -> None:
    """Ends this worker when its parent process dies: nobody would file what it computes, and the
    next start goes on from its checkpoint."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
