"""RunSpec -> Record, and `collect`, which computes only what is not there.

    records = collect({"dense": [spec], "moe": [spec_a, spec_b]})    # computes what the store lacks
    records = load({...})                                            # never computes; None where a record is absent

With `executor` (anything with `submit`, such as a process pool or the executor of a Dask client) runs go to its workers; only
the calling process writes records. Parents of runs (`init`) are computed first.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor, Future, as_completed
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from . import locks, paths
from .spec import RunSpec
from .store import Record, Store, store

PROBE_IMAGES = 12  # fixed test images whose token-to-expert maps every record keeps

Grid = dict[str, list[RunSpec]]


def load(grid: Grid, where: Store | None = None) -> dict[str, list[Record | None]]:
    """The records of a grid, in its order, None where there is none. Never computes."""
    where = where or store()
    return {name: [where.get(spec) for spec in specs] for name, specs in grid.items()}


def collect(grid: Grid, executor: Any = None, where: Store | None = None) -> dict[str, list[Record]]:
    """The records of a grid, in its order, computed where the store lacks them.

    A failed record counts as absent and is tried again. Raises RuntimeError naming the runs that failed, after all others
    have been computed and filed.
    """
    where = where or store()
    specs = [spec for group in grid.values() for spec in group]
    for spec in _unique(specs):
        check(spec)
    missing = [spec for spec in _unique(specs) if not _done(where, spec)]
    failed: list[str] = []
    bar = tqdm(total=len(missing), unit="run", desc="runs", delay=5, leave=False)
    with bar:
        for wave in _waves(missing, where):
            for record in _compute(wave, executor, where):
                if record.status == "failed":
                    failed.append(f"{record.id}: {record.error['message']}")
                bar.update(1 if any(record.id == spec.id for spec in missing) else 0)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed; they are filed as failed records:\n" + "\n".join(failed))
    for spec in _unique(specs):
        if spec.publish:
            where.publish(spec)
    return {name: [where.get(spec) for spec in group] for name, group in grid.items()}


def status_of(spec: RunSpec, where: Store | None = None) -> str:
    """"done", "failed", "running" or "missing"."""
    where = where or store()
    if locks.is_held(where.lock(spec.id)):
        return "running"
    record = where.peek(spec.id)
    return "missing" if record is None else {"ok": "done"}.get(record.status, "failed")


def model_of(spec: RunSpec, where: Store | None = None):
    """The model that a run leaves behind, on the CPU and in evaluation mode; the run is computed if its weights are not there."""
    from . import data
    from .compress import surgery
    where = where or store()
    spec = spec.but(keep=True)
    collect({"model": [spec]}, where=where)
    if not where.state(spec.id).is_file():  # the record is there, the weights are not: they stay in the cache of who made them
        for wave in _waves([spec], where):
            list(_compute(wave, None, where))
    splits = data.load(spec.data.but(test=None))
    return surgery.restored(spec, _state(spec, where.states), len(splits.class_names), splits.channels).eval()


def check(spec: RunSpec) -> None:
    """Build the model on no device, so that what does not fit is refused before any work.

    Raises ValueError naming the field: L beyond the depth, a patch that does not divide the image, an unknown backbone.
    """
    import torch

    from .compress import surgery
    from .compress.experts import remaining
    from .models.backbone import create
    from .models.upcycle import upcycle
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = create(spec.backbone, spec.data.image_size, classes=2, channels=3)
        if spec.moe is not None:
            upcycle(model, spec.moe)
        if spec.prune is not None:
            surgery.check(model, spec.prune)
        if spec.drop is not None:
            remaining(spec.moe.experts // spec.moe.members, spec.drop.share)
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' was asked for and this machine has none: use a profile made for the CPU")
    if spec.init is not None:
        check(spec.init)


def execute(spec: RunSpec, state_folder: str, checkpoint: str | None = None) -> tuple[dict, dict[str, np.ndarray]]:
    """Run one spec and return its record as a dict with its arrays; writes nothing but checkpoint and final weights.

    The parent's weights are read from `state_folder`, the own ones written there if `spec.keep`. A failure is returned as a
    failed record, never raised, except KeyboardInterrupt.
    """
    head = {"id": spec.id, "spec": spec.model_dump(mode="json"), "semantics": spec.canonical(), "environment": environment(spec),
            "code": code_hash(), "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    try:
        body, arrays = _run(spec, Path(state_folder), Path(checkpoint) if checkpoint else None)
        return head | {"status": "ok"} | body, arrays
    except Exception as error:
        from .train import Diverged
        where = {"step": error.step, "last": error.last} if isinstance(error, Diverged) else {}
        return head | {"status": "failed", "error": where | {
            "kind": type(error).__name__, "message": str(error), "traceback": traceback.format_exc(limit=-6)}}, {}


def _run(spec: RunSpec, states: Path, checkpoint: Path | None) -> tuple[dict, dict[str, np.ndarray]]:
    import torch
    from safetensors.torch import save_file

    from . import data, evaluate, train
    from .compress import surgery
    from .measure import cost, memory
    from .measure import timing as clock
    from .measure.routing import RoutingProbe
    from .models.backbone import build
    from .models.moe import without_experts
    from .weights import sha256_state
    torch.set_num_threads(spec.threads)
    clock.peak_rss_mib(reset=True)
    splits = data.load(spec.data)
    parent = None if spec.init is None else _state(spec.init, states)
    model = build(spec, len(splits.class_names), splits.channels, parent, partial(surgery.fit, spec=spec.init))
    model = model.to(spec.device)
    body: dict[str, Any] = {"classes": splits.class_names, "history": [], "curve": {}, "val": {}}
    masks = {}
    if spec.prune is not None:
        before = surgery.weights_in(model, spec.prune)
        masks = surgery.prune(model, spec, splits.train, len(splits.class_names))
        body["prune"] = {"before": before, "after": surgery.weights_in(model, spec.prune)} if not masks else {
            "before": sum(mask.numel() for mask in masks.values()), "after": sum(int(mask.sum()) for mask in masks.values())}
    if spec.drop is not None:
        before = _state(spec.init.init, states) if spec.drop.compares else None
        body["drop"] = {"scores": surgery.drop(model, spec, splits.train, len(splits.class_names), before)}
    weights = {"start": sha256_state(model.state_dict()), "parent": sha256_state(parent) if parent else None}
    timing: dict[str, float] = {}
    if spec.train is not None:
        with _tensorboard(states.parent / "tensorboard" / spec.id) as report:
            teacher, trained = _teacher(spec, splits, parent), model
            model, progress = train.fit(model, splits.train, splits.val, spec, checkpoint, report, teacher, masks)
        body["memory"] = _memory(trained, splits, spec, teacher)
        if spec.resident:
            body["memory"] |= memory.resident_mib(trained, spec, len(splits.class_names), splits.channels)
        body |= {"history": progress.history, "curve": progress.curve}
        timing |= {"train_seconds": progress.seconds, "train_images_per_s": progress.images / max(progress.seconds, 1e-9)}
        last = progress.history[-1]
        body["val"] = {"n": len(splits.val)} | {name: last[f"val_{name}"] for name in ("top1", "loss") if f"val_{name}" in last}
    probe = RoutingProbe(len(splits.class_names))
    result = evaluate.evaluate(model, splits.test, spec, probe)
    body["test"] = {"n": result.n} | ({} if result.top1 is None else {"top1": result.top1}) | {"loss": result.loss}
    if spec.experts_off:
        with without_experts(model):
            body["experts_off"] = {"n": result.n, "top1": evaluate.evaluate(model, splits.test, spec).top1}
    if spec.depth_probe:
        from .measure import features
        body["depth"] = features.by_depth(model, splits, spec)
    body["moe"] = probe.summary() if spec.moe is not None else []
    arrays = {"test_label": splits.test.labels.numpy().astype(np.int16)}
    index = torch.linspace(0, len(splits.test) - 1, min(PROBE_IMAGES, len(splits.test))).long()
    if result.predictions is None:
        arrays |= evaluate.reconstructions(model, splits.test, spec, index)
    else:
        arrays["test_pred"] = result.predictions.numpy()
    if spec.moe is not None:
        arrays |= probe.arrays() | {"token_expert": evaluate.token_maps(model, splits.test, spec, index).numpy()}
        if spec.colour_probe and result.predictions is not None:
            arrays["checker_expert"] = evaluate.checkerboard(model, spec, splits.channels).numpy()
    if spec.cam_probe:
        arrays["cam"] = evaluate.gradcam(model, splits.test, spec, index)
    if spec.moe is not None or result.predictions is None or spec.cam_probe:
        arrays["probe_index"] = splits.test.rows[index.numpy()].astype(np.int32)
    state = model.state_dict()
    weights["final"] = sha256_state(state)
    if spec.keep:
        with paths.written_whole(states / f"{spec.id}.safetensors") as part:
            save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, part)
    timing |= {"eval_images_per_s": result.images_per_s, "peak_rss_mib": clock.peak_rss_mib()}
    by_token = spec.moe is not None and spec.moe.router in ("token", "expert_choice", "priority")
    touched = sum(row["experts_per_image"] + spec.moe.shared for row in body["moe"]) if by_token else None
    counted = cost.count(getattr(model, "encoder", model), spec.data.image_size, experts_per_image=touched)
    body["cost"] = {"params_stored": counted.params_stored, "params_active": counted.params_active, "macs": counted.macs}
    return body | {"weights": weights, "timing": timing}, arrays


def _state(spec: RunSpec, states: Path) -> dict:
    """The final weights that a run left."""
    from safetensors.torch import load_file
    if not (states / f"{spec.id}.safetensors").is_file():
        raise FileNotFoundError(f"the run it starts from, {spec.id}, left no weights: see its own record")
    return load_file(states / f"{spec.id}.safetensors")


def _teacher(spec: RunSpec, splits: Any, parent: dict | None):
    """The parent as it was, where its gates are distilled; else None."""
    if spec.train.distil == "none":
        return None
    from .compress import surgery
    return surgery.restored(spec.init, parent, len(splits.class_names), splits.channels).to(spec.device).eval()


def _memory(model: Any, splits: Any, spec: RunSpec, teacher: Any) -> dict[str, float]:
    """What a training step on the first images of the run holds, in MiB by kind."""
    import torch

    from .measure.memory import step_mib
    from .models.moe import RoutingTape
    from .objective import losses
    index = torch.arange(min(spec.train.batch, len(splits.train)))
    images, labels = splits.train.batch(index, spec.data).to(spec.device), splits.train.labels[index].to(spec.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # router noise decides how many rows an expert saves
        model.train()
        return step_mib(model, lambda: losses(model, images, labels, spec, RoutingTape(model), teacher)["loss"])


@contextlib.contextmanager
def _tensorboard(folder: Path):
    """A hook for `train.fit` that writes history rows as TensorBoard scalars; None if that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with SummaryWriter(str(folder)) as writer:
        def report(row: dict) -> None:
            for name in row.keys() - {"epoch"}:
                writer.add_scalar(name, row[name], round(1000 * row["epoch"]))  # a whole number is asked for: 1/1000 epoch
            writer.flush()

        yield report


def environment(spec: RunSpec) -> dict[str, Any]:
    """Versions and processor: with spec and threads, all that a bit-for-bit equal record depends on."""
    names = ("torch", "timm", "numpy", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}, "processor": processor(),
            "threads": spec.threads}


def processor() -> str:
    """The processor's model name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def code_hash() -> str:
    """16 digits over the modules of `lib` that decide a result; shown as "computed by an older lib" when it differs."""
    here = Path(__file__).parent
    files = [here / name for name in ("data.py", "evaluate.py", "objective.py", "train.py", "weights.py", *sorted(
        str(file.relative_to(here)) for folder in ("models", "compress") for file in here.glob(f"{folder}/*.py")))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _unique(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """Each id once; `keep` and `publish` hold if any of the equal specs asks for them."""
    merged: dict[str, RunSpec] = {}
    for spec in specs:
        old = merged.get(spec.id)
        merged[spec.id] = spec if old is None else old.but(keep=old.keep or spec.keep, publish=old.publish or spec.publish)
    return list(merged.values())


def _done(where: Store, spec: RunSpec) -> bool:
    record = where.peek(spec.id)  # not a read of the page: what a page reads is its grid, when it is complete
    return record is not None and record.status == "ok"


def _waves(missing: list[RunSpec], where: Store) -> list[list[RunSpec]]:
    """Runs in waves: a wave needs only weights of earlier ones. Parents enter if their weights are not in the cache."""
    depth: dict[str, tuple[int, RunSpec]] = {}

    def add(spec: RunSpec) -> int:
        level = 0
        for needed in _needed(spec):
            if not where.state(needed.id).is_file():
                level = max(level, add(needed.but(keep=True)) + 1)
        before, known = depth.get(spec.id, (0, spec))
        depth[spec.id] = (max(level, before), spec.but(keep=spec.keep or known.keep, publish=spec.publish or known.publish,
                                                       study=known.study))
        return depth[spec.id][0]

    for spec in missing:
        add(spec)
    levels = sorted({level for level, _ in depth.values()})
    return [[spec for level, spec in depth.values() if level == wanted] for wanted in levels]


def _needed(spec: RunSpec) -> list[RunSpec]:
    """The runs whose final weights a run reads: its parent, and for scores that compare the parent's parent."""
    if spec.init is None:
        return []
    return [spec.init, spec.init.init] if spec.drop is not None and spec.drop.compares else [spec.init]


def _compute(wave: list[RunSpec], executor: Any, where: Store) -> Iterable[Record]:
    """The records of one wave, as they are filed. A lost worker's runs are computed by the calling process."""
    if executor is None:
        for spec in wave:
            yield _locked(spec, where)
        return
    with contextlib.ExitStack() as stack:
        for spec in sorted(wave, key=lambda each: each.id):  # one order for all processes: no two wait for each other
            stack.enter_context(locks.held(where.lock(spec.id), _told(spec)))
        open_ = [spec for spec in wave if not _filed(spec, where)]
        jobs, lost = {}, []
        for spec in open_:
            try:
                jobs[executor.submit(execute, spec, str(where.states), str(where.checkpoint(spec.id)))] = spec
            except BrokenExecutor:  # a pool that lost a worker takes no more work
                lost.append(spec)
        for job in _completed(jobs):
            try:
                made, arrays = job.result()
            except Exception:  # execute returns its failures, so this one is the worker's: each executor has its own kinds
                lost.append(jobs[job])
                continue
            yield _put(made, arrays, jobs[job], where)
    for spec in lost:
        warnings.warn(f"the worker of run {spec.id} was lost; the run goes on in the calling process", stacklevel=2)
        yield _locked(spec, where)


def _completed(jobs: dict) -> Iterable:
    """Futures as they finish; other kinds than the standard library's (Dask's) are waited for in order."""
    if all(isinstance(job, Future) for job in jobs):
        yield from as_completed(jobs)
    else:
        yield from jobs


def _told(spec: RunSpec):
    return lambda: tqdm.write(f"run {spec.id} is being computed by another process: waiting for it", file=sys.stderr)


def _filed(spec: RunSpec, where: Store) -> bool:
    return _done(where, spec) and not (spec.keep and not where.state(spec.id).is_file())


def _locked(spec: RunSpec, where: Store) -> Record:
    """Compute under the run's lock; if another process held it, its record is read instead."""
    with locks.held(where.lock(spec.id), _told(spec)):
        if _filed(spec, where):
            return where.get(spec)
        return _put(*execute(spec, str(where.states), str(where.checkpoint(spec.id))), spec, where)


def _put(made: dict, arrays: dict[str, np.ndarray], spec: RunSpec, where: Store) -> Record:
    """File a record. Once a finished run is filed its checkpoint goes, and with it what a killed write left beside.

    A child says whether its parent had been rebuilt with other weights than those of the parent's record.
    """
    parent = where.peek(spec.init.id) if spec.init is not None else None
    if made["status"] == "ok" and parent is not None and parent.status == "ok":
        made["weights"]["parent_differs"] = made["weights"].get("parent") != parent.weights["final"]
    record = where.put(made, arrays, spec)
    if record.status == "ok":
        for file in where.checkpoint(spec.id).parent.glob(f"*{spec.id}.pt*"):
            file.unlink(missing_ok=True)
    return record


def pool(workers: int | None = None):
    """A bounded local process pool for `collect`; each worker starts clean (spawn), so torch threads do not collide."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    return ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
