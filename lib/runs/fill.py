"""Fills what is missing, in its order (`order`), inside a budget of time.

plan = missing({"vimoe/routing": grid}, where, estimates, card)
fill(plan, 7200, executor, workers=2, where=where)
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import cluster, collect, locks
from .order import Item, Plan, resumable, startable
from .processes import Interrupted
from .store import Store

UNWIND_SECONDS = 5.0  # that interrupted runs are given to let go of their locks


@dataclass
class Outcome:
    """Holds ids of the runs that were filed, the reasons of those that failed, and the ids of
    those that the end of the budget interrupted."""

    filed: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)


class Workers:
    """An executor for `collect` whose jobs end at once when it is stopped, for who waits for them.

    What they do in a worker ends with the worker: who opened `executor` stops it, too.
    """

    def __init__(self, executor: Any):
        self.executor = executor
        self.jobs: set[Future] = set()
        self.reason: str | None = None  # why no more jobs are taken

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """Hands a job to the executor. Raises Interrupted once stopped or if a worker was lost."""
        if self.reason is not None:
            raise Interrupted(self.reason)
        job: Future = Future()
        self.jobs.add(job)
        try:
            inner = self.executor.submit(function, *arguments)
        except (BrokenExecutor, Interrupted) as error:
            lost = isinstance(error, BrokenExecutor)
            self.reason = f"a worker was lost ({error})" if lost else str(error)
            raise Interrupted(self.reason) from error
        inner.add_done_callback(lambda inner: self._hand_over(inner, job))
        return job

    def _hand_over(self, inner: Any, job: Future) -> None:
        self.jobs.discard(job)
        with contextlib.suppress(InvalidStateError):  # it was stopped in the meantime
            if inner.cancelled():
                job.set_exception(Interrupted("it was cancelled"))
            elif (error := inner.exception()) is None:
                job.set_result(inner.result())
            elif isinstance(error, BrokenExecutor):  # of this machine: no more are taken
                self.reason = self.reason or f"a worker was lost ({error})"
                job.set_exception(Interrupted(f"its worker was lost ({error})"))
            else:
                if isinstance(error, Interrupted):
                    self.reason = self.reason or str(error)
                job.set_exception(error)

    def stop(self, reason: str) -> None:
        """Ends all jobs with Interrupted."""
        self.reason = reason
        for job in list(self.jobs):
            with contextlib.suppress(InvalidStateError):
                job.set_exception(Interrupted(reason))


def _print(line: str) -> None:
    print(line, flush=True)  # a kill loses no line


def fill(
    plan: Plan,
    budget: float,
    executor: Any,
    workers: int,
    where: Store,
    say: Callable[[str], None] = _print,
) -> Outcome:
    """Computes what is missing on an executor, `workers` runs at a time, for `budget` seconds.

    No run is started that is not expected to end in time, but where none is: then the first ones
    that train are begun. A run that outlives the budget is interrupted, and its checkpoint stays
    for the next time. Each record is filed as it comes.
    """
    deadline = time.monotonic() + budget
    jobs, results = Workers(executor), queue.SimpleQueue()
    waiting, running, outcome = list(plan.items), {}, Outcome()
    end_in_time: set[str] = set()  # of those started, without those that failed

    def ready(item: Item) -> bool:
        parents_there = all(where.can_be_started_from(run) for run in item.needs)
        return parents_there and not locks.is_held(where.lock(item.spec.id))

    try:
        while True:
            while jobs.reason is None and len(running) < workers:
                item = startable(waiting, deadline - time.monotonic(), ready)
                if item is not None:
                    end_in_time.add(item.spec.id)
                elif not end_in_time:
                    item = resumable(waiting, deadline - time.monotonic(), ready)
                    if item is not None:
                        say(_begun(item))
                if item is None:
                    break
                waiting.remove(item)
                thread = threading.Thread(
                    target=_drive, args=(item, jobs, where, results), daemon=True
                )
                running[item.spec.id] = thread
                thread.start()
            if not running:
                break
            try:
                item, failure = results.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            del running[item.spec.id]
            if failure is None:
                outcome.filed.append(item.spec.id)
            else:
                outcome.failures.append(failure)
                end_in_time.discard(item.spec.id)
            say(_progress(item, failure, outcome, plan))
    finally:
        jobs.stop("the budget is spent")
        for thread in running.values():
            thread.join(UNWIND_SECONDS)
    while not results.empty():  # a record that was just being filed
        item, failure = results.get()
        if failure is None:
            outcome.filed.append(item.spec.id)
    outcome.interrupted = [run for run in running if run not in outcome.filed]
    return outcome


def _drive(item: Item, jobs: Workers, where: Store, results: queue.SimpleQueue) -> None:
    """Has one run computed and filed, and says so: (item, None or why it failed)."""
    spec, failure = item.spec, None
    try:
        collect.check(spec)
        failed = [r for r in collect.with_parents([spec], jobs, where) if r.status == "failed"]
        if failed:
            failure = collect.failure(failed[0])
    # a bad spec, a full disk, a lost worker: the others go on
    except BaseException as error:
        failure = f"run {spec.id}: {type(error).__name__}: {error}"
    results.put((item, failure))


def _begun(item: Item) -> str:
    return (
        f"nothing that is missing ends within the budget: {item.spec.id} ({item.serves[0]}) is "
        "begun, and the next start goes on from its checkpoint"
    )


def _progress(item: Item, failure: str | None, outcome: Outcome, plan: Plan) -> str:
    done = f"{len(outcome.filed)} of {len(plan.items)} filed"
    return failure or f"{item.spec.id}  seed {item.spec.seed}  {item.serves[0]}  ({done})"


# ---- workers


@contextlib.contextmanager
def workers_of(
    scheduler: str | None, count: int | None, file: Path | None = None
) -> Iterator[tuple[Any, int]]:
    """Opens an executor; yields it with the number of runs that it computes at a time.

    scheduler, file: of a Dask cluster, as in `cluster.opened`; without both, processes of this
    machine. count: None = all workers of the cluster, or one process. Local processes end when the
    block does, whatever they are doing. Raises ValueError where `distributed` is asked for and not
    installed.
    """
    if scheduler is not None or file is not None:
        with cluster.opened(scheduler, file) as workers:
            yield workers, count or len(workers)
        return
    executor = collect.pool(count or 1)
    try:
        yield executor, count or 1
    finally:
        if executor._pending_work_items:  # idle workers end by themselves
            executor.stop()
        executor.shutdown(cancel_futures=True)


def seconds_of(text: str, what: str = "budget") -> float:
    """Reads a time such as 2h, 90m, 1h30m, 45s or 0. Raises ValueError for anything else, which
    says `what` it is for."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    if text != "0" and (not parts or "".join(n + u for n, u in parts) != text):
        raise ValueError(
            f"{what} {text!r} is no time: give hours, minutes or seconds, such as 2h, 90m or 1h30m"
        )
    return sum(float(number) * units[unit] for number, unit in parts)
