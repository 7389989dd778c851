"""Reads batches ahead in processes beside the run, with the order and the draws of one process.

A whole batch is made by one process: its random draws come from one generator, whose state travels
with the request. So a batch has the same bits whatever the number of processes, which is no part of
a run: MOE_LOADERS gives it.

- The processes are forked from a server with none of the run's threads and open files. A fork of
  the run itself would copy what torch's, a kernel's and a communicator's threads have locked just
  then, and NCCL and gloo ask not to be forked; a new Python for each process imports torch again.
- They hand over float32 pixels, since resized ones are no whole numbers. That is a tenth to a
  quarter of a process's time for an image; bytes would take a fifth of that, but their arithmetic
  would be the run's.
- A request names files or rows, and at most BATCHES_AHEAD batches a process wait in shared memory.

Axis letters: **B** images, **C** channels, **S** side in pixels that the model sees.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..machine import cores
from ..spec import RunSpec
from .augment import augmented, normalised

VARIABLE = "MOE_LOADERS"
MOST = 8  # processes a run, if the variable does not say
BATCHES_AHEAD = 2  # finished or under way, a process
WHAT_TO_DO = (
    f"Read with fewer processes, {VARIABLE}=1, or with none, {VARIABLE}=0; take smaller batches; "
    "or give more shared memory (of a container: --shm-size=8g)"
)


class Request(NamedTuple):
    """Says how one batch is made, in any process.

    jobs: a call an image that gives it as (C, h, w) uint8, None for one that is not handed over and
    that nothing but draws depends on; kind: of augmentation; side: S; state: of the generator that
    augments, None without; mean, std: (1, C, 1, 1) of pixels in 0..1; share: of the batch, that is
    handed over.
    """

    jobs: list[Callable[[], Tensor] | None]
    kind: str
    side: int
    state: Tensor | None
    mean: Tensor
    std: Tensor
    share: slice = slice(None)

    def batch(self) -> Tensor:
        """Decodes, augments and normalises: (B, C, S, S), or its share."""
        generator = None
        if self.state is not None:
            generator = torch.Generator()
            generator.set_state(self.state)
        nothing = torch.zeros(self.mean.shape[1], 1, 1, dtype=torch.uint8)
        images = [nothing if job is None else job() for job in self.jobs]
        pixels = augmented(images, self.kind, self.side, generator)[self.share]
        return normalised(pixels, self.mean, self.std)


# ---------------------------------------------------------------- how many


def asked_for() -> int | None:
    """Reads the number of processes that MOE_LOADERS asks for; None where it is not set.

    Raises ValueError for what is no whole number from 0 on.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return None
    if not given.isdecimal():
        raise ValueError(
            f"{VARIABLE}={given!r} is no number of processes that read images for a run: give a "
            "whole one, 0 to read in the run itself, or unset it"
        )
    return int(given)


def processes(run: RunSpec) -> int:
    """Counts the processes that read for a run: what is asked for, else by the cores at hand.

    0 where this process may not have any of its own, with a warning if they were asked for.
    """
    asked = asked_for()
    if multiprocessing.current_process().daemon:  # a rule of Python's multiprocessing
        if asked:
            warnings.warn(
                f"{VARIABLE}={asked}, but this is a daemonic process, which may start none: images "
                "are read in the run itself. Dask's workers are not daemonic with "
                "DASK_DISTRIBUTED__WORKER__DAEMON=False",
                stacklevel=3,
            )
        return 0
    return _by_cores(run) if asked is None else asked


def _by_cores(run: RunSpec) -> int:
    """Counts the cores that a run leaves idle, MOST at most.

    None in a worker of a pool, whose runs share the cores among them.
    """
    if multiprocessing.parent_process() is not None:
        return 0
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torch's launchers
    computing = run.threads if run.device == "cpu" else 1
    return max(0, min(MOST, cores() // ranks_here - computing))


# ---------------------------------------------------------------- reading ahead


def in_processes(requests: Iterable[Request], count: int, pinned: bool) -> Iterator[Tensor]:
    """Yields the batch of each request, in their order, made ahead by `count` processes.

    They end with the iterator, and with this process however it ends. pinned: batches lie in memory
    from which a card can copy by itself. Raises what a request raises when its turn comes, and
    RuntimeError where a process was killed or shared memory is full.
    """
    loader = DataLoader(
        _Batches(),
        sampler=_Pickled(requests),
        batch_size=None,  # a request is a batch already
        num_workers=count,
        prefetch_factor=BATCHES_AHEAD,
        pin_memory=pinned,
        multiprocessing_context=_context(),
        worker_init_fn=_begin,
        generator=torch.Generator(),  # its base seed is not drawn from the global one
    )
    with _without_main():
        batches = iter(loader)
    try:
        while (batch := _next(batches)) is not None:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        del batches  # ends the processes, also where a traceback keeps this frame


def _next(batches: Iterator[Tensor | Exception]) -> Tensor | Exception | None:
    """Takes the next batch, or the error in its place; None after the last one."""
    try:
        return next(batches, None)
    except (RuntimeError, EOFError, OSError) as error:  # the last two: of what it left behind
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        return RuntimeError(
            f"a process that reads images was killed ({error or type(error).__name__}). Systems do "
            f"so where memory is full, or shared memory is ({_shared_memory()}). {WHAT_TO_DO}"
        )


class _Pickled:
    """Hands requests over as bytes; one that fails is replaced by its error, which takes its turn.

    A DataLoader pickles in a thread, where an error is lost and the run waits for ever.
    """

    def __init__(self, requests: Iterable[Request]):
        self.requests = requests

    def __iter__(self) -> Iterator[bytes]:
        requests = iter(self.requests)
        while True:
            try:
                content = pickle.dumps(next(requests))
            except StopIteration:
                return
            except Exception as error:
                content = pickle.dumps(_sendable(error))
            yield content


class _Batches(Dataset):
    """Makes the batch of a request, in another process; what it raises is handed over, too.

    A DataLoader would raise another error, with a traceback for a message.
    """

    def __getitem__(self, request: bytes) -> Tensor | Exception:
        try:
            content = pickle.loads(request)
            if isinstance(content, Exception):
                return content
            batch = content.batch()
        except Exception as error:
            return _sendable(error)
        try:
            if batch.nbytes < batch.untyped_storage().nbytes():  # a share: not all of it is moved
                batch = batch.clone()
            return batch.share_memory_()
        except RuntimeError as error:  # not left to the thread that sends, which would lose it
            return RuntimeError(
                f"a batch of {batch.nbytes / 2**20:.0f} MiB does not fit into shared memory "
                f"({_shared_memory()}): {error}. {WHAT_TO_DO}"
            )


def _sendable(error: Exception) -> Exception:
    """Returns an error that another process can read: itself, or its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is made anew
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _begin(number: int) -> None:
    """Prepares a process that reads: it ends with the run, which alone hears Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _context() -> multiprocessing.context.BaseContext:
    """Chooses how processes start: from a clean server where there is one, else anew."""
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        # imported once, not by each process; the last two if the run reads by them
        readers = [name for name in ("datasets", "h5py") if name in sys.modules]
        context.set_forkserver_preload([__name__, *readers])
    return context


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Starts processes that do not run the script of this one, of which they need nothing.

    Python runs it in each, and a script without `if __name__ == "__main__"` would start again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _shared_memory() -> str:
    try:
        space = shutil.disk_usage("/dev/shm")
    except OSError:  # not on every system
        return "its size is not known here"
    return f"/dev/shm has {space.free / 2**20:,.0f} of {space.total / 2**20:,.0f} MiB left"
