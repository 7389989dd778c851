"""Kill, full disk, rivals, lost workers: after each of them the store is whole and the next start
goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from lib import paths
from lib.runs import collect as runs
from lib.runs import locks, processes
from lib.runs.store import Store
from lib.spec import BackboneSpec, DataSpec, MoESpec, RunSpec, TrainSpec
from lib.training import loop

# 8 steps
SPEC = RunSpec(
    data=DataSpec(train=64, val=20, test=30, augment="shift"),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    moe=MoESpec(layers=1, experts=2, noise=1.0),
    train=TrainSpec(epochs=2.0, batch=16, ema=0.9),
    threads=1,
)


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """A python process with `lib` on its path."""
    env = {**os.environ, "PYTHONPATH": str(paths.ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def quick(monkeypatch):
    """Runs are made up; returns the seeds computed so far."""
    log: list[int] = []

    def execute(spec, states, checkpoint=None):
        log.append(spec.seed)
        return {
            "id": spec.id,
            "spec": spec.model_dump(mode="json"),
            "status": "ok",
            "weights": {"final": "f"},
            "test": {"top1": 50.0},
        }, {"test_pred": np.arange(1000) % 7}

    monkeypatch.setattr(runs, "execute", execute)
    return log


# ---- kill

KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from lib.runs import collect as runs
from lib.runs.store import Store
from lib.spec import RunSpec
from lib.training import checkpoint, loop

steps, real = [0], loop.losses
def losses(*args):
    steps[0] += 1
    if steps[0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

loop.losses = losses
checkpoint.CHECKPOINT_SECONDS = 0  # and a clock that ticks once a step: a checkpoint after each
checkpoint.time = SimpleNamespace(monotonic=lambda: steps[0])
where = Store(Path(sys.argv[1]) / "published", Path(sys.argv[1]) / "private")
runs.collect({"a": [RunSpec.model_validate_json(sys.argv[2])]}, where=where)
"""


def test_kill_in_the_middle_of_a_run(where, tmp_path, monkeypatch):
    child = python(KILLED_RUN, str(tmp_path), SPEC.model_dump_json())
    _, error = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, error
    assert where.checkpoint(SPEC.id).is_file() and where.find(SPEC.id) is None
    assert runs.status_of(SPEC, where) == "missing"  # its lock died with it

    steps, real = [0], loop.losses
    monkeypatch.setattr(
        loop, "losses", lambda *args: steps.__setitem__(0, steps[0] + 1) or real(*args)
    )
    record = runs.collect({"a": [SPEC]}, where=where)["a"][0]
    assert steps[0] == 2  # six of the eight steps were done by the killed process
    whole = runs.collect({"a": [SPEC]}, where=Store(tmp_path / "p", tmp_path / "q"))["a"][0]
    assert record.result() == whole.result() and steps[0] == 10
    assert not list(where.checkpoint("").parent.iterdir())


KILLED_WRITE = """
import os, signal, sys
from pathlib import Path
from lib import paths

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "before the rename":
    os.replace = die
with paths.written_whole(Path(sys.argv[1])) as part:
    part.write_text("new" if sys.argv[2] == "before the rename" else "ne")
    if sys.argv[2] == "half-way":
        die()
"""


@pytest.mark.parametrize("moment", ["half-way", "before the rename"])
@pytest.mark.parametrize("old", [None, "old"])
def test_kill_in_the_middle_of_a_write(tmp_path, moment, old):
    file = tmp_path / "record.json"
    if old:
        file.write_text(old)
    child = python(KILLED_WRITE, str(file), moment)
    _, error = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, error
    assert (file.read_text() if file.exists() else None) == old
    [left] = [each for each in tmp_path.iterdir() if each != file]
    assert left.name.startswith(".record.json.") and left.suffix == ".part"


def test_leftovers_of_killed_writes_are_never_read(where, quick):
    folder = where.private / "records" / "foundations"
    folder.mkdir(parents=True)
    for name in (f".{SPEC.id}.json.77.part", f".{SPEC.id}.npz.77.part"):
        (folder / name).write_text("half")
    (folder / f"{SPEC.id}.npz").write_text("arrays whose JSON was never written")
    assert runs.load({"a": [SPEC]}, where) == {"a": [None]}
    record = runs.collect({"a": [SPEC]}, where=where)["a"][0]
    assert quick == [0] and record.arrays["test_pred"].shape == (1000,)
    assert runs.load({"a": [SPEC]}, where)["a"][0].result() == record.result()


# ---- full disk


# Two syncs a file: itself and its folder.
@pytest.mark.parametrize("works_for", [0, 2], ids=["arrays", "json"])
def test_full_disk(where, quick, monkeypatch, works_for):
    left, real = [works_for], os.fsync

    def fsync(handle):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device"):
        runs.collect({"a": [SPEC]}, where=where)
    assert where.find(SPEC.id) is None and not list(where.private.rglob("*.part"))
    monkeypatch.setattr(os, "fsync", real)
    record = runs.collect({"a": [SPEC]}, where=where)["a"][0]
    assert record.status == "ok" and quick == [0, 0]
    assert runs.load({"a": [SPEC]}, where)["a"][0].result() == record.result()


def test_write_that_fails_leaves_the_old_file_and_no_part(tmp_path):
    file = tmp_path / "deep" / "file"
    with paths.written_whole(file) as part:
        part.write_text("old")
    with pytest.raises(ZeroDivisionError), paths.written_whole(file) as part:
        part.write_text("half")
        1 / 0  # noqa: B018
    assert file.read_text() == "old" and list(file.parent.iterdir()) == [file]


# ---- rivals

RIVAL = """
import os, sys, time
from pathlib import Path
from lib.runs import collect as runs
from lib.runs import locks
from lib.runs.store import Store
from lib.spec import RunSpec

locks.POLL_SECONDS = 0.05
folder = Path(sys.argv[1])

def execute(spec, states, checkpoint=None):
    with open(folder / "computed", "a") as log:
        log.write(f"{os.getpid()}\\n")
    end = time.monotonic() + 30
    while not (folder / "waits").exists() and time.monotonic() < end:  # the other one comes
        time.sleep(0.01)
    head = {"id": spec.id, "spec": spec.model_dump(mode="json"), "status": "ok"}
    return head | {"weights": {"final": "f"}, "test": {"top1": os.getpid()}}, {}

said = runs._say_waiting

def says_waiting(spec):
    def waiting():
        said(spec)()
        (folder / "waits").touch()
    return waiting

# without torch: both are at the lock within the same second
runs.execute, runs.check, runs._say_waiting = execute, lambda spec: None, says_waiting
(folder / str(os.getpid())).touch()
while len(list(folder.glob("[0-9]*"))) < 2:  # start together
    time.sleep(0.01)
where = Store(folder / "published", folder / "private")
spec = RunSpec.model_validate_json(sys.argv[2])
print(runs.collect({"a": [spec]}, where=where)["a"][0].test["top1"])
"""


@pytest.mark.parametrize("kind", ["flock", "lease"])
def test_two_processes_want_one_run(tmp_path, kind):
    rivals = [python(RIVAL, str(tmp_path), SPEC.model_dump_json(), MOE_LOCK=kind) for _ in range(2)]
    said = [rival.communicate(timeout=60) for rival in rivals]
    assert [rival.returncode for rival in rivals] == [0, 0], said
    computed = (tmp_path / "computed").read_text().split()
    # both hold the one result
    assert len(computed) == 1 and [out.split()[-1] for out, _ in said] == computed * 2
    waited = "is being computed by another process: waiting for it"
    assert sum(waited in out + error for out, error in said) == 1


def test_lock_of_a_killed_process_is_free(tmp_path):
    file = tmp_path / "lock"
    code = (
        "import os, signal, sys; from pathlib import Path; from lib.runs import locks\n"
        "with locks.held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(file)],
        env={**os.environ, "PYTHONPATH": str(paths.ROOT)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == "held\n" and locks.is_held(file)
    child.kill()
    child.communicate(timeout=60)
    assert not locks.is_held(file)
    with locks.held(file, waiting=lambda: pytest.fail("waited for a dead process")):
        assert locks.is_held(file)
    assert not locks.is_held(file)


@pytest.mark.parametrize("kind", ["flock", "lease"])
def test_two_threads_of_one_process_exclude_each_other(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MOE_LOCK", kind)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.02)
    file, events, inside = tmp_path / "lock", [], threading.Event()

    def holder():
        with locks.held(file):
            inside.set()
            time.sleep(0.3)
            events.append("released")

    thread = threading.Thread(target=holder)
    thread.start()
    inside.wait()
    assert locks.is_held(file)
    with locks.held(file, waiting=lambda: events.append("waiting")):
        events.append("taken")
    thread.join()
    assert events == ["waiting", "released", "taken"]
    assert file.exists() == (kind == "flock") and not locks.is_held(file)


def test_unknown_kind_of_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_LOCK", "nfs")
    with pytest.raises(
        ValueError,
        match="MOE_LOCK='nfs': valid are 'flock' .local disk. and 'lease' .shared storage.",
    ):
        with locks.held(tmp_path / "lock"):
            pass


@pytest.fixture
def lease(tmp_path, monkeypatch) -> Path:
    """Lease locks that count as abandoned after 0.6 s; returns a lock file."""
    monkeypatch.setenv("MOE_LOCK", "lease")
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.02)
    return tmp_path / "lock"


def test_abandoned_lease_is_taken_over(lease):
    lease.write_text("a machine that lost power")
    old = time.time() - 2
    os.utime(lease, (old, old))
    assert not locks.is_held(lease)
    with locks.held(lease, waiting=lambda: pytest.fail("waited for an abandoned lease")):
        assert "lost power" not in lease.read_text() and locks.is_held(lease)
    assert not list(lease.parent.iterdir())


def test_fresh_lease_of_a_dead_holder_is_waited_for_once(lease):
    lease.write_text("died a moment ago")
    told, began = [], time.monotonic()
    with locks.held(lease, waiting=lambda: told.append(1)):
        assert 0.4 < time.monotonic() - began < 5 and told == [1]


def test_live_lease_is_renewed_and_waited_for(lease):
    events, inside = [], threading.Event()

    def holder():
        with locks.held(lease):
            inside.set()
            time.sleep(1.8)  # three times the age at which it would count as abandoned
            events.append("released")

    thread = threading.Thread(target=holder)
    thread.start()
    inside.wait()
    with locks.held(lease, waiting=lambda: events.append("waiting")):
        events.append("taken")
    thread.join()
    assert events == ["waiting", "released", "taken"] and not lease.exists()


def test_holder_that_slept_through_its_lease_leaves_the_new_one_alone(lease):
    with locks.held(lease):
        lease.write_text("another process took over")
        past = time.time() - 100
        os.utime(lease, (past, past))
        time.sleep(0.3)  # several renewals
        assert time.time() - lease.stat().st_mtime > 50  # not renewed on the other's behalf
    assert lease.read_text() == "another process took over"


def test_late_takeover_gives_a_live_lease_back(lease, monkeypatch):
    # Two waiters see an abandoned lease; the first takes it over before the second moves the file:
    # the second must not win.
    lease.write_text("the first waiter")
    real, answers = locks._abandoned, [True]
    monkeypatch.setattr(locks, "_abandoned", lambda file: answers.pop() if answers else real(file))
    assert not locks._take(lease, "the second waiter")
    assert lease.read_text() == "the first waiter" and list(lease.parent.iterdir()) == [lease]


# ---- a lost worker


class Killing:
    """A pool whose workers die at the first job, as under the out-of-memory killer."""

    def __init__(self, pool):
        self.pool = pool

    def submit(self, call, *args):
        return self.pool.submit(os._exit, 9)


def test_lost_worker(where, quick):
    specs = [SPEC.but(seed=seed) for seed in (1, 2)]
    with runs.pool(1) as pool, pytest.warns(UserWarning, match="the worker of run .* was lost"):
        records = runs.collect({"a": specs}, Killing(pool), where)["a"]
    assert sorted(quick) == [1, 2]  # nothing twice
    assert [record.spec.seed for record in records] == [1, 2]  # nothing lost
    assert len(list((where.private / "records" / "foundations").glob("*.json"))) == 2
    assert json.loads(records[0].file.read_text())["status"] == "ok"


# ---- Ctrl-C to the process that opened a pool


class Finished:
    """An executor whose jobs are finished at once, but for the last, which never begins."""

    def __init__(self, count):
        self.jobs, self.count = [], count

    def submit(self, call, *args):
        self.jobs.append(job := Future())
        if len(self.jobs) < self.count:
            job.set_result(runs.execute(*args))
        return job


def interrupt_after_the_first(jobs):
    """Stands for `as_completed`."""
    yield next(iter(jobs))
    raise KeyboardInterrupt


def interrupt_once(monkeypatch, owner, name):
    """The next call of a method is interrupted before it does anything."""
    real, calls = getattr(owner, name), []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("moment", ["waiting", "filing", "between"])
def test_an_interrupt_files_what_is_finished(where, quick, monkeypatch, moment):
    specs, executor = [SPEC.but(seed=seed) for seed in range(4)], Finished(4)
    if moment == "waiting":
        monkeypatch.setattr(runs, "as_completed", interrupt_after_the_first)
    elif moment == "filing":
        interrupt_once(monkeypatch, Store, "put")
    else:
        interrupt_once(monkeypatch, runs.tqdm, "update")
    with pytest.raises(KeyboardInterrupt):
        runs.collect({"a": specs}, executor, where)
    assert [record is not None for record in runs.load({"a": specs}, where)["a"]] == [
        True,
        True,
        True,
        False,
    ]
    assert executor.jobs[3].cancelled() and len(quick) == 3
    assert not any(locks.is_held(where.lock(spec.id)) for spec in specs)


def test_a_pool_that_is_left_by_an_exception_ends_its_workers():
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), runs.pool(1) as pool:
        job = pool.submit(time.sleep, 600)
        while not job.running():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_a_process_are_interrupts_inside_a_block(number):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup one of them is ignored
    try:
        with pytest.raises(KeyboardInterrupt), processes.interruptible():
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


ORPHAN = """
import os, subprocess, sys, time
child = (
    "import sys, time; from lib.runs import processes; "
    "processes.end_with(int(sys.argv[1]), ENDING); print('watching', flush=True); time.sleep(600)"
)
child = child.replace("ENDING", sys.argv[1])
started = subprocess.Popen(
    [sys.executable, "-c", child, str(os.getpid())], stdout=subprocess.PIPE, text=True
)
started.stdout.readline()
print(started.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["None", "lambda: __import__('os')._exit(3)"])
def test_a_process_ends_with_the_one_that_started_it(ending):
    parent = python(ORPHAN, ending)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while _is_at_work(child):
        assert time.monotonic() < deadline, "it outlived its parent"
        time.sleep(0.1)


def _is_at_work(process: int) -> bool:
    """Tells whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
