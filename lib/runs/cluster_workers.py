"""An executor for `collect` and `fill` on the workers of a Dask cluster.

A run goes to a worker that has what it needs (`needs`). A worker that lacks the data, or has
damaged weights, gives it back, and another one tries. A run whose workers die is tried elsewhere
until Dask gives it up (its setting `distributed.scheduler.allowed-failures`); then it is filed as
failed, and never computed by the caller, which may be a login node.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import paths
from ..spec import RunSpec
from . import needs, states
from .processes import Interrupted

FOLDERS = ("MOE_DATA", "MOE_CACHE", "MOE_WEIGHTS")  # that a worker has its own of
WATCH_SECONDS = 30.0  # between two looks whether there are workers at all
# failures that may be a worker's own: what it lacks, and files of weights that are damaged there
OF_A_WORKER = re.compile(
    "^(FileNotFound|Permission|OtherCode|OSError|MemoryError|OutOfMemory)|SHA-256|is damaged"
)

Offers = dict[str, dict[str, float]]  # {address of a worker: {resource: amount}}


@dataclass
class _Job:
    """A run under way: its task, the future that `collect` waits for, the workers that gave it
    back, with why, and Dask's future."""

    execute: Callable
    spec: RunSpec
    states: Path
    checkpoint: str
    future: Future = field(default_factory=Future)
    given_back: dict[str, str] = field(default_factory=dict)  # {address: reason}
    running: Any = None


class Workers:
    """An executor on the workers of a Dask client. `cluster.opened` makes one, and closes it.

    asked_for: number of workers that are still to come, with those that are there.
    """

    def __init__(self, client: Any, asked_for: int = 0):
        self.client, self.asked_for = client, asked_for
        self.lost: str | None = None  # why the scheduler is not asked any more
        self.address = client.scheduler.address if client.scheduler else "the scheduler"
        self._under_way: dict[str, _Job] = {}  # by run; until a worker gave an answer
        self._shares: dict[tuple[str, str], bool] = {}  # by mark and address of a worker
        self._marks: dict[Path, Path] = {}  # by folder of weights
        # by key; who starts from them holds them
        self._sent: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._data: dict[tuple[str, str], tuple[Any, str]] = {}  # fingerprints, and who saw them
        self._guard = threading.RLock()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __len__(self) -> int:
        return max(len(self.client.nthreads()), self.asked_for)

    @property
    def has_card(self) -> bool:
        """Says whether a worker offers a card."""
        return any(needs.CARD in offer for offer in self._offers().values())

    def check_device(self, spec: RunSpec) -> None:
        """Raises ValueError for a run that no worker can take; says what would."""
        self._asked_of(spec, self._offers())

    def submit(self, execute: Callable, spec: RunSpec, states: str, checkpoint: str) -> Future:
        """Hands a run to the cluster; the future gives what `execute` returns.

        Raises Interrupted once the scheduler is lost, ValueError for a run that no worker can take.
        """
        if self.lost is not None:
            raise Interrupted(self.lost)
        job = _Job(execute, spec, Path(states), checkpoint)
        try:
            self._send(job)
        except (OSError, CancelledError, RuntimeError) as error:
            self._lose(error)
            raise Interrupted(self.lost) from error
        # collect takes back what it does not wait for any more
        job.future.add_done_callback(lambda future: future.cancelled() and job.running.cancel())
        return job.future

    def close(self) -> None:
        """Takes back all runs that are not done; those under way end, their checkpoints stay."""
        from . import remote

        self._closed.set()
        with self._guard:
            jobs, self._under_way = list(self._under_way.values()), {}
        for job in jobs:
            job.future.cancel()
        for mark in self._marks.values():
            mark.unlink(missing_ok=True)
        if jobs and self.lost is None:
            with contextlib.suppress(OSError, CancelledError, RuntimeError):
                self.client.cancel([job.running for job in jobs])
                self.client.run(remote.stop, [job.spec.id for job in jobs], on_error="ignore")

    def _watch(self) -> None:
        """Says when runs wait and no worker is left, which Dask does not: new ones may come."""
        has_said = False
        while not self._closed.wait(WATCH_SECONDS) and self.lost is None:
            with contextlib.suppress(OSError, CancelledError, RuntimeError):
                is_deserted = bool(self._under_way) and not self.client.nthreads()
                if is_deserted and not has_said:
                    print(
                        f"{self.address} has no worker left: {len(self._under_way)} runs wait for "
                        "new ones",
                        file=sys.stderr,
                        flush=True,
                    )
                has_said = is_deserted

    # ---- on the way to a worker

    def _send(self, job: _Job) -> None:
        from . import remote

        offers = self._offers()
        asked = self._asked_of(job.spec, offers)
        mark, sha256, weights = self._weights(job, list(offers))
        task = remote.Task(
            job.spec, str(job.states), job.checkpoint, str(mark), sha256, remote.code()
        )
        job.running = self.client.submit(
            _unpacked,
            pickle.dumps(partial(remote.carry_out, job.execute, task)),
            weights,
            key=f"run-{job.spec.id}-{uuid.uuid4().hex[:8]}",
            pure=False,
            resources=asked or None,
            workers=self._others(job, offers) if job.given_back else None,
            allow_other_workers=bool(job.given_back),  # where the others are gone
        )
        with self._guard:
            self._under_way[job.spec.id] = job
        job.running.add_done_callback(partial(self._arrived, job))

    def _weights(
        self, job: _Job, workers: list[str]
    ) -> tuple[Path, dict[str, str], dict[str, Any]]:
        """The mark in the folder of weights; SHA-256 and, where a worker does not share the folder,
        bytes of the files that a run starts from, by id."""
        mark = self._mark(job.states)
        sha256, sent = {}, {}
        shared = bool(job.spec.needed_runs) and self._is_shared(str(mark), workers)
        for run in job.spec.needed_runs:
            file = states.file_of(run, job.states)
            if shared or not file.is_file():  # a worker that lacks it says so
                continue
            content = file.read_bytes()
            sha256[run.id] = hashlib.sha256(content).hexdigest()
            key = f"weights-{run.id}-{sha256[run.id][:16]}"
            if key not in self._sent:
                # A task, which is repeated where a worker that holds them is lost; `bytes` gives
                # them as they are.
                self._sent[key] = sent[run.id] = self.client.submit(bytes, content, key=key)
            sent[run.id] = self._sent[key]
        return mark, sha256, sent

    def _mark(self, folder: Path) -> Path:
        """Names a file in a folder, there as long as this executor is, by which a worker tells that
        the folder is the caller's and not one of the same name."""
        with self._guard:
            if folder not in self._marks:
                self._marks[folder] = folder / f".caller-{uuid.uuid4().hex}"
                folder.mkdir(parents=True, exist_ok=True)
                self._marks[folder].touch()
            return self._marks[folder]

    def _is_shared(self, mark: str, workers: list[str]) -> bool:
        """Says whether all workers see a file of the caller's."""
        from . import remote

        new = [worker for worker in workers if (mark, worker) not in self._shares]
        if new:
            answers = self.client.run(remote.sees, mark, workers=new, on_error="return")
            self._shares |= {(mark, worker): said is True for worker, said in answers.items()}
        return all(self._shares.get((mark, worker)) for worker in workers)

    def _others(self, job: _Job, offers: Offers) -> list[str]:
        """Lists the workers that can take a run and have not given it back."""
        asked = self._asked_of(job.spec, offers)
        fit = [worker for worker, offer in offers.items() if _fits(asked, offer)]
        return [worker for worker in fit if worker not in job.given_back]

    def _asked_of(self, spec: RunSpec, offers: Offers) -> dict[str, float]:
        """The resources to ask for: those that a run needs and workers declare, and a card."""
        declared = {name for offer in offers.values() for name in offer}
        asked = {
            name: amount
            for name, amount in needs.of(spec).items()
            if name in declared or name == needs.CARD
        }
        if offers and not any(_fits(asked, offer) for offer in offers.values()):
            said = ",".join(f"{name}={amount:.4g}" for name, amount in asked.items())
            raise ValueError(
                f"run {spec.id} needs a worker with {said or 'any resources'}, and the "
                f"{len(offers)} of {self.address} have {_listed(offers)}: start one that has it, "
                f'with `dask worker {self.address} --nthreads 1 --resources "{said}"`'
            )
        return asked

    def _offers(self) -> Offers:
        """What the workers have now."""
        try:
            workers = self.client.scheduler_info()["workers"]
        except (OSError, CancelledError, RuntimeError) as error:
            self._lose(error)
            raise Interrupted(self.lost) from error
        return {address: dict(worker["resources"]) for address, worker in workers.items()}

    # ---- on the way back

    def _arrived(self, job: _Job, running: Any) -> None:
        """Hands over what came of a run; what goes wrong here is said to who waits."""
        with contextlib.suppress(InvalidStateError):  # it was taken back in the meantime
            try:
                outcome = self._outcome(job, running)
                if outcome is not None:
                    job.future.set_result(outcome)
            except BaseException as error:
                job.future.set_exception(error)

    def _outcome(self, job: _Job, running: Any) -> tuple[dict[str, Any], Any] | None:
        """What `execute` returned; None where the run was taken back or goes to another worker.

        Raises Dask's error of a run that it gave up, and Interrupted if the scheduler is lost.
        """
        if job.future.done():
            return None
        if running.status in ("cancelled", "lost"):
            self._lose("it went away, or let go of the runs")
            raise Interrupted(self.lost)
        with self._guard:
            self._under_way.pop(job.spec.id, None)
        if running.status == "error":
            raise running.exception()
        try:
            result = running.result()
        except (OSError, CancelledError) as error:
            self._lose(error)
            raise Interrupted(self.lost) from error
        if result.content["status"] == "failed" and not self._stands(job, result):
            self._send(job)
            return None
        if result.content["status"] == "ok" and (how := self._other_data(job.spec, result)):
            from .execute import failed

            return failed(job.spec, ValueError(how))
        if result.weights is not None:
            with paths.written_whole(states.file_of(job.spec, job.states)) as part:
                part.write_bytes(result.weights)
        return result.content, result.arrays

    def _stands(self, job: _Job, result: Any) -> bool:
        """Says whether a failure stands; else another worker may have what this one lacks.

        One that may be a worker's own names all that have tried.
        """
        error, worker = result.content["error"], result.worker
        if error["kind"] == states.DamagedWeights.__name__:
            for run in job.spec.needed_runs:  # a damaged file of the caller's is set aside here
                with contextlib.suppress(states.DamagedWeights, FileNotFoundError):
                    states.read(run, job.states)
            return True
        if not OF_A_WORKER.search(f"{error['kind']}: {error['message']}"):
            return True
        folders = ", ".join(f"{name}={worker[name]}" for name in FOLDERS)
        job.given_back[worker["address"]] = (
            f"worker {worker['address']} on {worker['host']} ({folders}): {error['message']}"
        )
        if self._others(job, self._offers()):
            return False
        error["message"] = "no worker can start it. " + " -- ".join(job.given_back.values())
        return True

    def _other_data(self, spec: RunSpec, result: Any) -> str | None:
        """Says how the data set of a worker differs from the first one's of that name, if it
        does."""
        from ..inputs import fingerprint

        seen, address = result.content.get("data"), result.worker["address"]
        if seen is None:
            return None
        first, of_worker = self._data.setdefault((spec.data.name, spec.data.label), (seen, address))
        how = fingerprint.difference(first, seen)
        return how and (
            f"data set {spec.data.name} of worker {address} (MOE_DATA={result.worker['MOE_DATA']}) "
            f"is not the one of worker {of_worker}: {how}. Give all workers the same data"
        )

    def _lose(self, reason: object) -> None:
        """Notes that the scheduler is lost, and ends all that waits for it."""
        with self._guard:
            if self.lost is None:
                self.lost = (
                    f"the scheduler {self.address} is lost ({reason}): records that were filed "
                    "stay, the rest is computed when the same command is started again"
                )
            jobs, self._under_way = list(self._under_way.values()), {}
        for job in jobs:
            with contextlib.suppress(InvalidStateError):
                job.future.set_exception(Interrupted(self.lost))


def _unpacked(call: bytes, weights: Mapping[str, bytes]) -> Any:
    """Carries out what was packed, on a worker."""
    import pickle

    return pickle.loads(call)(weights)


# The scheduler unpickles what it passes on. This makes pickle send the function whole instead of by
# its name, so that the scheduler does without this project.
_unpacked.__module__ = "__main__"


def _fits(asked: Mapping[str, float], offer: Mapping[str, float]) -> bool:
    return all(offer.get(name, 0) >= amount for name, amount in asked.items())


def _listed(offers: Mapping[str, Mapping[str, float]]) -> str:
    """Writes what workers have, each kind once."""
    kinds = {
        ",".join(f"{n}={v:.4g}" for n, v in sorted(o.items())) or "none" for o in offers.values()
    }
    return "; ".join(sorted(kinds))
