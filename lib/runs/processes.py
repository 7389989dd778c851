"""Processes end with the one that started them, however that ends, and in order when told to.

What a killed parent would have filed nobody files: a worker that computes on only takes memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import TracebackType

from ..machine import cores

POLL_SECONDS = 0.5
UNWIND_SECONDS = 10.0  # that a process is given to end what it started itself
ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP


class Interrupted(BaseException):
    """Ends a run from outside. No Exception: `collect` would take it for a lost worker, and go on
    with the run in this process, where nothing could stop it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a with block as Ctrl-C does, so that its `finally` are carried
    out.

    A signal that is ignored (nohup) stays so. Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def end_with(parent: int, ending: Callable[[], None] | None = None) -> None:
    """Ends this process once its parent is another than the process `parent`.

    ending: called first, and given UNWIND_SECONDS; None ends at once.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        if ending is not None:
            ending()
            time.sleep(UNWIND_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Pool(ProcessPoolExecutor):
    """A local process pool whose workers end when its with block is left by an exception."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if kind is not None:
            self.stop()
        return super().__exit__(kind, error, traceback)

    def stop(self) -> None:
        """Ends the workers, whatever they do, as `terminate_workers` does from Python 3.14 on."""
        for process in list((self._processes or {}).values()):
            process.terminate()


def pool(workers: int | None = None) -> Pool:
    """Opens a bounded local process pool for `collect`; each worker starts clean (spawn), so torch
    threads do not collide, and ends with the process that opened the pool, however that ends."""
    return Pool(
        workers or cores(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_the_pool,
    )


def _end_with_the_pool() -> None:
    """Ends this worker when its parent process dies. The next start goes on from its
    checkpoint."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
