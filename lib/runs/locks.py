"""One computes, the others wait: an exclusive lock on a run.

On a local disk the kernel's `flock` does it: it is gone the moment its holder dies, however it
dies. Shared storage often lacks a trustworthy flock; there (MOE_LOCK=lease) a lease file does it,
whose holder renews it and which counts as abandoned once it has not been renewed for LEASE_SECONDS.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LEASE_SECONDS = 60.0
POLL_SECONDS = 0.5


@contextmanager
def held(file: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock `file`; waits for whoever holds it, calling `waiting` once. MOE_LOCK chooses
    flock (default) or lease."""
    kind = os.environ.get("MOE_LOCK", "flock")
    if kind not in ("flock", "lease"):
        raise ValueError(
            f"MOE_LOCK={kind!r}: valid are 'flock' (local disk) and 'lease' (shared storage)"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with (_flock if kind == "flock" else _lease)(file, waiting):
        yield


def is_held(file: Path) -> bool:
    """True while somebody holds the lock; never waits."""
    if not file.exists():
        return False
    if os.environ.get("MOE_LOCK") == "lease":
        return not _abandoned(file)
    with open(file) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@contextmanager
def _flock(file: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    with open(file, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        # The file stays: removing it would let a third process lock a new file of the same name
        # beside a waiting second one.
        yield


@contextmanager
def _lease(file: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    owner = f"{socket.gethostname()} {os.getpid()} {threading.get_ident()} {time.time_ns()}"
    told = False
    while not _take(file, owner):
        if waiting is not None and not told:
            waiting()
            told = True
        time.sleep(POLL_SECONDS)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(LEASE_SECONDS / 6):
            try:
                if (
                    file.read_text() == owner
                ):  # else it was taken over while this process was stopped
                    os.utime(file)
            except FileNotFoundError:
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if file.exists() and file.read_text() == owner:
            file.unlink()


def _take(file: Path, owner: str) -> bool:
    """Create the lease, or move an abandoned one aside first. Creation is exclusive, so one of
    several wins."""
    if file.exists() and _abandoned(file):
        aside = file.with_name(f"{file.name}.{time.time_ns()}.abandoned")
        try:
            os.replace(file, aside)
            if not _abandoned(
                aside
            ):  # another process took over between the look and the move: give its lease back
                os.link(aside, file)
            aside.unlink()
        except (FileNotFoundError, FileExistsError):
            pass  # another process was first
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as out:
        out.write(owner)
    return True


def _abandoned(file: Path) -> bool:
    try:
        return time.time() - file.stat().st_mtime > LEASE_SECONDS
    except FileNotFoundError:
        return False
