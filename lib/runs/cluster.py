"""Opens a Dask cluster for runs, and makes sure of its workers.

    with cluster.opened("tcp://host:8786") as workers:
        lib.collect(grid, workers)

Only the calling process files records; see `cluster_workers` for what becomes of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import deployments
from .cluster_workers import Workers
from .processes import Interrupted

ANSWER_SECONDS = 30.0  # that a scheduler is given to answer
INSTALL = 'pip install -e ".[cluster]"'


class SchedulerLost(RuntimeError):
    """A scheduler that went away while runs were under way."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describes the two options that name a cluster."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--scheduler", metavar="tcp://...", help="compute on the workers of a running Dask cluster"
    )
    where.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="start the Dask cluster that a YAML file describes, such as clusters/slurm.yaml, and "
        "compute there",
    )


@contextlib.contextmanager
def opened(scheduler: str | None = None, file: Path | None = None) -> Iterator[Workers]:
    """Opens an executor on a running scheduler, or on a cluster that a file describes.

    scheduler: such as tcp://host:8786; its workers stay. file: as of `deployments`; its workers end
    with the block. Raises ValueError for workers that cannot compute runs, ConnectionError where
    none answers, SchedulerLost at the end if the scheduler went away in between.
    """
    with contextlib.ExitStack() as stack:
        asked_for = 0
        if file is None:
            client = stack.enter_context(_client(scheduler))
            _need_workers(client, scheduler)
        else:
            deployment = deployments.read(file)
            cluster = stack.enter_context(deployments.started(deployment))
            client = stack.enter_context(_client(cluster))
            _wait_for_worker(client, file, deployment.wait)
            asked_for = deployment.workers
        _check_workers(client)
        workers = Workers(client, asked_for)
        try:
            yield workers
        except Interrupted as error:
            if workers.lost is None:
                raise
            raise SchedulerLost(workers.lost) from error
        finally:
            workers.close()
        if workers.lost is not None:
            raise SchedulerLost(workers.lost)


def _client(place: Any) -> Any:
    """Connects to a scheduler. place: its address, or one of Dask's clusters."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(
            f"--scheduler {place} needs the package distributed, which is not installed: {INSTALL}"
        ) from error
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def connect() -> None:
        try:
            answers.put(Client(place, timeout=ANSWER_SECONDS, set_as_default=False))
        except Exception as error:
            answers.put(error)

    # Dask's own limit does not end the wait for a port that is open and says nothing.
    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS + 1)
    except queue.Empty:
        answer = TimeoutError("the port is open and says nothing")
    if not isinstance(answer, Exception):
        return answer
    raise ConnectionError(
        f"no scheduler answered at {place} within {ANSWER_SECONDS:.0f} s ({answer}): look "
        "whether `dask scheduler` runs there, whether the port is its own (8786 unless it was "
        "given another one; 8787 is its dashboard), and whether a firewall lies in between"
    ) from answer


def _need_workers(client: Any, address: str) -> None:
    """Raises ConnectionError for a scheduler without workers."""
    if not client.scheduler_info()["workers"]:
        raise ConnectionError(
            f"the scheduler {address} has no workers: start one, on each machine that is to "
            f"compute, with `dask worker {address} --nthreads 1`"
        )


def _wait_for_worker(client: Any, file: Path, seconds: float) -> None:
    """Waits for the first worker of a cluster that was just started."""
    try:
        client.wait_for_workers(1, timeout=seconds)
    except TimeoutError as error:
        raise ConnectionError(
            f"no worker of {file} has come within {seconds:.0f} s: look at its queue and logs, or "
            "give it longer with `wait: 2h` in the file"
        ) from error


def _check_workers(client: Any) -> None:
    """Raises ValueError for a worker that cannot compute runs, with what to do."""
    from . import remote

    several = {worker: n for worker, n in client.nthreads().items() if n > 1}
    for worker, threads in several.items():
        raise ValueError(
            f"worker {worker} carries out {threads} tasks at a time in one process, which can "
            "compute one run at a time: start it with --nthreads 1 (a run's own threads are those "
            "of its profile), and several of them for several runs"
        )
    for worker, said in client.run(remote.describe, on_error="return").items():
        if isinstance(said, OSError):  # it has just gone away
            continue
        if isinstance(said, Exception):
            raise ValueError(
                f"worker {worker} cannot import this project ({type(said).__name__}: {said}): "
                "install the same checkout there, or name it in the worker's PYTHONPATH"
            )
        if said["code"] != remote.code():
            raise ValueError(
                f"worker {worker} on {said['host']} has other code of lib than the caller "
                f"({said['code']} there, {remote.code()} here): bring the same checkout there and "
                "start the worker anew"
            )
