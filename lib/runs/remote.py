"""What a worker of a cluster does: it says what it is, and carries out one run at a time.

A worker that sees the folder of the caller's weights works in it, and in the caller's checkpoints:
a run that was begun elsewhere goes on. Any other one works in its own cache (MOE_CACHE): weights
that a run starts from come with the run, those that it leaves go back with its record.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import paths
from ..spec import RunSpec
from . import environment, states
from .cluster_workers import FOLDERS
from .execute import Arrays, failed

# of lib: what a record is made by
ROOMS = ("spec", "inputs", "models", "routers", "pruning", "extraction")
ROOMS += ("training", "measure", "runs")
# torch's threads, random numbers and peak of memory are of the whole process
_ONE_RUN = threading.Lock()
_GUARD = threading.Lock()
_thread_of_run: dict[str, int] = {}


class OtherCode(RuntimeError):
    """A worker whose code of `lib` is not the caller's."""


class Stopped(BaseException):
    """Ends a run whose result nobody waits for. No Exception: `execute` would file it as failed."""


@dataclass(frozen=True)
class Task:
    """Holds a run as it goes to a worker.

    states, checkpoint: the caller's folder of weights and file of the checkpoint. mark: a file in
    that folder, which only a worker that shares it sees. sha256: of the files of the weights that
    the run starts from, by id. code: hash of the caller's code.
    """

    spec: RunSpec
    states: str
    checkpoint: str
    mark: str
    sha256: Mapping[str, str]
    code: str


@dataclass(frozen=True)
class Result:
    """Holds what comes back from a worker.

    content, arrays: the record; weights: bytes of the file that the run leaves, None where the
    caller has it or none is kept; worker: `describe` of who computed it, with its
    `address`.
    """

    content: dict[str, Any]
    arrays: Arrays
    weights: bytes | None
    worker: dict[str, str]


@functools.cache  # a process keeps the code that it has imported, whatever its files say later
def code() -> str:
    """Hashes all that a record is made by, to 16 digits."""
    return environment.code_hash(ROOMS)


def describe() -> dict[str, str]:
    """Describes this worker: code, Python, torch, host, process and folders."""
    return {
        "code": code(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        **{name: os.environ.get(name, "not set") for name in FOLDERS},
    }


def sees(mark: str) -> bool:
    """Tells whether a file of the caller's is there for this worker, too."""
    return Path(mark).is_file()


def carry_out(execute: Callable, task: Task, weights: Mapping[str, bytes]) -> Result:
    """Carries out a run where this worker may write, and returns what belongs to the caller.

    execute: as `lib.runs.execute.execute`. weights: bytes of the files of the task's `sha256`, as
    far as they were sent. A worker that cannot start it says so in a failed record.
    """
    from distributed import get_worker

    with _ONE_RUN:
        try:
            with _stoppable(task.spec.id):
                content, arrays, left = _carried_out(execute, task, weights)
        except (OtherCode, OSError) as error:
            content, arrays, left = *failed(task.spec, error), None
    return Result(content, arrays, left, describe() | {"address": get_worker().address})


def _carried_out(
    execute: Callable, task: Task, weights: Mapping[str, bytes]
) -> tuple[dict[str, Any], Arrays, bytes | None]:
    """The record, its arrays, and the weights that go back, as in Result."""
    if code() != task.code:
        raise OtherCode(f"its code of lib is {code()}, the caller's is {task.code}")
    spec = task.spec
    if sees(task.mark):
        content, arrays = execute(spec, task.states, task.checkpoint)
        return content, arrays, None
    folder = paths.cache() / "states"
    checkpoint = paths.cache() / "checkpoints" / Path(task.checkpoint).name
    for run, sha256 in task.sha256.items():
        _place(folder / f"{run}.safetensors", sha256, weights.get(run))
    content, arrays = execute(spec, str(folder), str(checkpoint))
    left = None
    if content["status"] == "ok":
        checkpoint.unlink(missing_ok=True)
        left = states.file_of(spec, folder).read_bytes() if spec.keep else None
    return content, arrays, left


def _place(file: Path, sha256: str, content: bytes | None) -> None:
    """Writes weights that were sent, unless they are there. What is there and differs, such as half
    a copy, is set aside."""
    if file.is_file():
        if hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
            return
        why = f"{file} on {socket.gethostname()} is not the file that the caller has"
        paths.set_aside([file], file.parents[1] / "damaged", why, "the caller's is taken")
    if content is None:
        raise FileNotFoundError(
            f"the weights {file.name} that it starts from are not in {file.parent} and were not "
            "sent: this worker came after others that share the caller's folder"
        )
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"the weights {file.name} did not arrive as they were sent")
    with paths.written_whole(file) as part:
        part.write_bytes(content)


# ---- ending a run


@contextlib.contextmanager
def _stoppable(run: str) -> Iterator[None]:
    """Notes which thread computes a run, for the time of a with block."""
    with _GUARD:
        _thread_of_run[run] = threading.get_ident()
    try:
        yield
    finally:
        with _GUARD:
            _thread_of_run.pop(run, None)


def stop(runs: list[str]) -> None:
    """Ends those of the given runs that this worker computes, at their next line of Python: within
    a training step. Their checkpoints stay."""
    with _GUARD:
        for run in runs:
            if run in _thread_of_run:
                thread = ctypes.c_ulong(_thread_of_run[run])
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Stopped))
