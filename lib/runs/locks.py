"""One process computes a run, the others wait: an exclusive lock on a run.

On a local disk filelock does it by the kernel's `flock`: the lock is gone the moment its holder
dies, however it dies. Shared storage often lacks a trustworthy flock; there (MOE_LOCK=lease) a
lease file does it, whose holder renews it and which counts as abandoned once it has not been
renewed for LEASE_SECONDS. (filelock's own leases are not used: each who waits must watch a dead
holder's for its whole duration, where a look at the age of the file tells at once.)
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LEASE_SECONDS = 60.0
POLL_SECONDS = 0.5


@contextmanager
def held(file: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock `file` for the time of a with block, once nobody else holds it.

    waiting: called once if somebody else holds it. MOE_LOCK chooses flock (default) or lease;
    raises ValueError for any other word. The file of a flock stays: were it removed, a third
    process could lock a new file of the same name beside a waiting second one.
    """
    kind = os.environ.get("MOE_LOCK", "flock")
    if kind not in ("flock", "lease"):
        raise ValueError(
            f"MOE_LOCK={kind!r}: valid are 'flock' (local disk) and 'lease' (shared storage)"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with (_flock if kind == "flock" else _lease)(file, waiting):
        yield


def is_held(file: Path) -> bool:
    """Tells whether somebody holds the lock; never waits."""
    if not file.exists():
        return False
    if os.environ.get("MOE_LOCK") == "lease":
        return not _abandoned(file)
    try:
        with _kernel_lock(file).acquire(blocking=False):
            return False
    except Timeout:
        return True


def _kernel_lock(file: Path) -> FileLock:
    # A lock object for each use, so that two threads of one process exclude each other, too.
    # Without flock there is an error: a file as a substitute would outlive its process.
    return FileLock(file, fallback_to_soft=False)


@contextmanager
def _flock(file: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    file.touch()  # with the permissions of the umask: filelock's are for its owner to write alone
    lock = _kernel_lock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if waiting is not None:
            waiting()
        lock.acquire(poll_interval=POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _lease(file: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    owner = f"{socket.gethostname()} {os.getpid()} {threading.get_ident()} {time.time_ns()}"
    has_called_waiting = False
    while not _take(file, owner):
        if waiting is not None and not has_called_waiting:
            waiting()
            has_called_waiting = True
        time.sleep(POLL_SECONDS)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(LEASE_SECONDS / 6):
            try:
                # Another owner took it over while this process was stopped: the lease is theirs.
                if file.read_text() == owner:
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
    """Creates the lease and tells whether it did; an abandoned one is moved aside first.

    Creation is exclusive, so one of several who try wins.
    """
    if file.exists() and _abandoned(file):
        aside = file.with_name(f"{file.name}.{time.time_ns()}.abandoned")
        try:
            os.replace(file, aside)
            # Another process took over between the look and the move: its lease is given back.
            if not _abandoned(aside):
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
    """Tells whether a lease was not renewed for LEASE_SECONDS; one that is not there is not."""
    try:
        return time.time() - file.stat().st_mtime > LEASE_SECONDS
    except FileNotFoundError:
        return False
