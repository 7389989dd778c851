"""Runs on a Dask cluster: real ones on two worker processes, of which one is killed; made-up ones
on a worker inside this process, for what goes wrong."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from data_folders import encoded, parquet
from distributed import LocalCluster

from lib import paths
from lib.__main__ import main
from lib.runs import cluster, cluster_workers, needs
from lib.runs import collect as runs
from lib.runs import fill as filling
from lib.runs.cluster_workers import Workers
from lib.runs.demand import memory_of
from lib.runs.estimate import Estimate
from lib.runs.execute import execute
from lib.runs.order import missing
from lib.runs.store import Store
from lib.spec import BackboneSpec, DataSpec, MoESpec, RunSpec, TrainSpec

EXAMPLES = paths.ROOT / "clusters"
SQUARES = RunSpec(
    data=DataSpec(name="squares", image_size=14, val=8, test=8),
    backbone=BackboneSpec(patch=7, width=8, depth=1, heads=2),
    moe=MoESpec(layers=1, experts=2),
    train=TrainSpec(epochs=1.0, batch=16),
    threads=1,
)
LONG = SQUARES.but(seed=99, train={"epochs": 1e6})
DEADLINE = 600  # seconds that anything is given on a slow machine


def wait_until(true, what: str) -> None:
    """Waits for what other threads and processes do."""
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, f"not within {DEADLINE} s: {what}"
        time.sleep(0.02)


def squares(home: Path) -> Path:
    """A folder of data sets with one of 100 pictures."""
    pictures = [encoded(2 * i, (14, 14)) for i in range(100)]
    parquet(home / "squares" / "train.parquet", pictures, [i % 2 for i in range(100)])
    return home


class Processes:
    """A scheduler, and workers in processes of their own, each with its folders."""

    def __init__(self, folder: Path):
        self.folder, self.workers = folder, {}
        self.home = squares(folder / "home")
        self.dask = LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=50)
        self.address = self.dask.scheduler_address

    def start(self, name: str, **env: str) -> None:
        """Starts a worker, unless it is there; with the data, where no other MOE_DATA is given."""
        if name in self.workers:
            return
        command = ["-m", "distributed.cli.dask_worker", self.address, "--name", name]
        command += ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "60"]
        given = {"MOE_DATA": str(self.home), "MOE_CACHE": str(self.cache(name))}
        with open(self.folder / f"{name}.log", "w") as log:
            self.workers[name] = subprocess.Popen(
                [sys.executable, *command, "--local-directory", str(self.folder / "dask")],
                env={**os.environ, "PYTHONPATH": str(paths.ROOT), **given, **env},
                cwd=self.folder,  # which is on the path, too
                stdout=log,
                stderr=log,
            )

    def cache(self, name: str) -> Path:
        return self.folder / f"cache-{name}"

    def need(self, *names: str) -> None:
        """Waits until these workers are there and no others."""
        for name in set(self.workers) - set(names):
            self.kill(name)
        for name in names:
            self.start(name)
        there = self.dask.scheduler.workers
        wait_until(lambda: {w.name for w in there.values()} == set(names), f"workers {names}")

    def address_of(self, name: str) -> str:
        [address] = [w.address for w in self.dask.scheduler.workers.values() if w.name == name]
        return address

    def computing(self, name: str) -> bool:
        """Tells whether a worker has a run."""
        there = self.dask.scheduler.workers.values()
        return any(w.name == name and w.processing for w in there)

    def kill(self, name: str) -> None:
        process = self.workers.pop(name)
        process.kill()
        process.wait()

    def end(self) -> None:
        for name in list(self.workers):
            self.kill(name)
        self.dask.close()


@pytest.fixture(scope="module", autouse=True)
def sockets_end_here():
    """Collects what clusters leave open, which a test that records warnings would find later."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("cluster"))
    try:
        started.start("a")
        started.start("b")
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module")
def inside():
    """A scheduler with one worker, both in this process: functions of this file can be its runs."""
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        dashboard_address=":0",
        silence_logs=50,
        resources={"MEMORY": 2e9},
    ) as started:
        yield started.scheduler_address


# ---- real runs


def test_forty_runs_and_a_killed_worker(processes, where, tmp_path, monkeypatch):
    """What is filed is what one process makes, each run once."""
    monkeypatch.setenv("MOE_DATA", str(processes.home))
    parent = SQUARES.but(seed=100)
    specs = [SQUARES.but(seed=seed) for seed in range(36)]
    specs += [SQUARES.but(seed=seed, init=parent) for seed in range(36, 40)]
    filed = []

    def file_record(content, arrays, spec, into):
        filed.append((spec.id, content["status"]))
        return real(content, arrays, spec, into)

    def kill_in_the_middle():
        wait_until(lambda: len(filed) >= 5 and processes.computing("b"), "five runs")
        killed_at.append(len(filed))
        processes.kill("b")

    real, killed_at = runs.file_record, []
    monkeypatch.setattr(runs, "file_record", file_record)
    processes.need("a", "b")
    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    with cluster.opened(processes.address) as workers:
        records = runs.collect({"a": specs}, workers, where)["a"]
    killer.join()
    assert killed_at[0] < 40
    assert sorted(filed) == sorted((spec.id, "ok") for spec in [parent, *specs])
    alone = Store(tmp_path / "alone" / "published", tmp_path / "alone" / "private")
    expected = runs.collect({"a": specs}, where=alone)["a"]
    assert [record.result() for record in records] == [record.result() for record in expected]
    assert all(record.environment["torch"] for record in records)  # of the worker that made it
    assert not list(where.states.glob(".caller-*"))


def test_workers_that_share_no_folder(processes, where, monkeypatch):
    """Weights go to a worker and come back; half a copy there is set aside."""
    processes.need("a")
    monkeypatch.setenv("MOE_DATA", str(processes.home))
    monkeypatch.setattr(Workers, "_mark", lambda self, folder: folder / "on another machine")
    parent = SQUARES.but(seed=200)
    child, second = (SQUARES.but(seed=seed, init=parent) for seed in (201, 202))
    there = processes.cache("a")
    with cluster.opened(processes.address) as workers:
        [record] = runs.collect({"a": [child]}, workers, where)["a"]
        assert where.state(parent.id).read_bytes() == _state(there, parent).read_bytes()
        assert record.weights["parent"] == where.peek(parent.id).weights["final"]
        whole = _state(there, parent).read_bytes()
        _state(there, parent).write_bytes(whole[: len(whole) // 2])
        [record] = runs.collect({"a": [second]}, workers, where)["a"]
    assert record.weights["parent"] == where.peek(parent.id).weights["final"]
    assert _state(there, parent).read_bytes() == whole
    assert len(list((there / "damaged").glob(f"*/{parent.id}.safetensors"))) == 1
    assert not list((there / "checkpoints").glob("*"))


def test_damaged_weights_of_the_caller_are_made_anew(processes, where, monkeypatch):
    processes.need("a")
    monkeypatch.setenv("MOE_DATA", str(processes.home))
    monkeypatch.setattr(Workers, "_mark", lambda self, folder: folder / "on another machine")
    parent = SQUARES.but(seed=210)
    with cluster.opened(processes.address) as workers:
        runs.collect({"a": [parent.but(keep=True)]}, workers, where)
        whole = where.state(parent.id).read_bytes()
        where.state(parent.id).write_bytes(whole[: len(whole) // 2])
        with pytest.warns(UserWarning, match=f"{parent.id}.*cannot be read"):
            [record] = runs.collect({"a": [SQUARES.but(seed=211, init=parent)]}, workers, where)[
                "a"
            ]
    assert record.status == "ok" and where.state(parent.id).read_bytes() == whole
    assert not record.weights["parent_differs"]


def _state(cache: Path, spec: RunSpec) -> Path:
    return cache / "states" / f"{spec.id}.safetensors"


def test_a_worker_without_the_data_set(processes, where, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    processes.need("a")
    processes.start("poor", MOE_DATA=str(empty))
    processes.need("a", "poor")
    given_back = []
    real = Workers._stands

    def stands(self, job, result):
        given_back.append(result.worker["address"])
        return real(self, job, result)

    monkeypatch.setattr(Workers, "_stands", stands)
    specs = [SQUARES.but(seed=seed) for seed in range(300, 308)]
    poor = processes.address_of("poor")
    with cluster.opened(processes.address) as workers:
        records = runs.collect({"a": specs}, workers, where)["a"]
        assert [record.status for record in records] == ["ok"] * 8
        assert set(given_back) == {poor}
        nowhere = SQUARES.but(data={"name": "circles"})
        with pytest.raises(RuntimeError) as said:
            runs.collect({"a": [nowhere, SQUARES.but(seed=308)]}, workers, where)
    for part in ("data set 'circles'", poor, f"MOE_DATA={empty}", str(processes.home / "circles")):
        assert part in str(said.value)
    assert where.is_done(SQUARES.but(seed=308).id)


def test_what_outlives_the_budget_ends_on_the_worker(processes, where, monkeypatch):
    processes.need("a")
    monkeypatch.setenv("MOE_DATA", str(processes.home))
    plan = missing({"a/one": {"long": [LONG]}}, where, Seconds(), False)
    with filling.workers_of(processes.address, None) as (executor, count):
        assert count == 1
        outcome = filling.fill(plan, 4.0, executor, count, where, lambda line: None)
    assert outcome.interrupted == [LONG.id] and not where.find(LONG.id)
    with cluster.opened(processes.address) as workers:  # its only thread is free again
        [record] = runs.collect({"a": [SQUARES.but(seed=400)]}, workers, where)["a"]
    assert record.status == "ok"


class Seconds:
    """Estimates a second for every run."""

    def of(self, spec):
        return Estimate(1.0, "given")


def test_a_run_whose_workers_die_is_filed_as_failed(processes, where, monkeypatch):
    """The caller, which may be a login node, does not compute it."""
    monkeypatch.setenv("MOE_DATA", str(processes.home))
    processes.need("a", "b")
    monkeypatch.setattr(processes.dask.scheduler, "allowed_failures", 0)

    def kill():
        wait_until(lambda: processes.computing("b"), "a run on b")
        processes.kill("b")

    killer = threading.Thread(target=kill)
    with cluster.opened(processes.address) as workers:
        address = processes.address_of("b")
        monkeypatch.setattr(workers, "_others", lambda job, offers: [])
        killer.start()
        with only_on(workers, address), pytest.raises(RuntimeError, match="KilledWorker") as said:
            runs.collect({"a": [LONG]}, workers, where)
        killer.join()
        [record] = runs.collect({"a": [SQUARES.but(seed=410)]}, workers, where)["a"]
    assert address in str(said.value) and record.status == "ok"
    failed = where.peek(LONG.id)
    assert failed.error["kind"] == "KilledWorker" and failed.environment == {}


@contextlib.contextmanager
def only_on(workers, address):
    """Sends runs to one worker alone."""
    real = workers.client.submit
    workers.client.submit = lambda *a, **k: real(*a, **{**k, "workers": [address]})
    try:
        yield
    finally:
        workers.client.submit = real


def test_other_code_of_lib_is_refused(processes, tmp_path):
    shutil.copytree(paths.LIB, tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "lib" / "training" / "loop.py", "a") as file:
        file.write("\n# other\n")
    processes.need("a")
    processes.start("old", PYTHONPATH=str(tmp_path))
    processes.need("a", "old")
    with pytest.raises(ValueError, match="other code of lib than the caller") as said:
        with cluster.opened(processes.address):
            pass
    assert processes.address_of("old") in str(said.value)
    processes.kill("old")


def test_from_the_command_line(processes, where, tmp_path, monkeypatch, capsys):
    from lib.pages import profiles

    processes.need("a")
    monkeypatch.setenv("MOE_DATA", str(processes.home))
    monkeypatch.setenv("MOE_CACHE", str(tmp_path / "mine"))
    spec = SQUARES.but(seed=500)
    monkeypatch.setattr(profiles, "plan", lambda key, profile, **given: {"a": [spec]})
    command = ["run", "vimoe/layer_scan", "--profile", "smoke"]
    assert main([*command, "--records", "--scheduler", processes.address]) == 0
    assert Store(paths.RESULTS, tmp_path / "mine").is_done(spec.id)
    assert "all 1 records are there" in capsys.readouterr().out
    assert main([*command, "--scheduler", processes.address]) == 2
    assert "are for --records" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--scheduler", "tcp://host:1", "--cluster", "clusters/local.yaml"])
    assert "not allowed with" in capsys.readouterr().err


# ---- made-up runs, on a worker inside this process

going, begun, waiting = threading.Event(), threading.Event(), set()


def made_up(spec, states, checkpoint=None):
    """A run that is done at once; one of the seeds `waiting` waits until it may go on."""
    if spec.seed in waiting:
        begun.set()
        going.wait(DEADLINE)
    return {
        "id": spec.id,
        "spec": spec.model_dump(mode="json"),
        "status": "ok",
        "weights": {"final": "f"},
        "environment": {},
        "code": "",
    }, {}


@pytest.fixture
def one_waits(monkeypatch):
    """Three made-up runs in the order in which they are sent; the second one waits."""
    specs = sorted((SQUARES.but(seed=seed) for seed in range(3)), key=lambda spec: spec.id)
    monkeypatch.setattr(runs, "execute", made_up)
    monkeypatch.setattr(sys.modules[__name__], "waiting", {specs[1].seed})
    going.clear()
    begun.clear()
    yield specs
    going.set()


@contextlib.contextmanager
def cut_off(address, ready=begun.is_set):
    """An executor whose connection is closed from the other end, as a dying process does it."""

    def cut():
        wait_until(ready, "the moment to cut")
        workers.client.loop.add_callback(workers.client.scheduler_comm.comm.abort)

    with cluster.opened(address) as workers:
        cutter = threading.Thread(target=cut)
        cutter.start()
        yield workers
        cutter.join()
        going.set()


def test_a_scheduler_that_goes_away(inside, where, one_waits):
    """What is finished is filed, and nothing is computed here."""
    done, waits, _ = one_waits
    with pytest.raises(cluster.SchedulerLost, match=f"the scheduler {inside} is lost"):
        with cut_off(inside, lambda: where.is_done(done.id)) as workers:
            runs.collect({"a": [done, waits]}, workers, where)
    assert where.is_done(done.id) and where.find(waits.id) is None


def test_a_scheduler_that_goes_away_ends_the_filling(inside, where, one_waits):
    plan = missing({"a/one": {"runs": one_waits}}, where, Seconds(), False)
    with pytest.raises(cluster.SchedulerLost):
        with cut_off(inside) as workers:
            outcome = filling.fill(plan, DEADLINE, workers, 1, where, lambda line: None)
    [failure] = outcome.failures  # no more were begun
    assert f"the scheduler {inside} is lost" in failure and one_waits[1].id in failure
    assert set(outcome.filed) <= {one_waits[0].id, one_waits[2].id}


def test_workers_that_are_all_gone(where, one_waits, monkeypatch, capsys):
    """Who waits is told, and what comes later computes."""
    monkeypatch.setattr(cluster_workers, "WATCH_SECONDS", 0.05)
    said = []

    def leave_and_come():
        wait_until(begun.is_set, "a run")
        dask.scale(0)
        going.set()
        wait_until(lambda: said.append(capsys.readouterr().err) or "no worker" in "".join(said), "")
        dask.scale(1)

    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tcp"
    ) as dask:
        leaver = threading.Thread(target=leave_and_come)
        leaver.start()
        with cluster.opened(dask.scheduler_address) as workers:
            records = runs.collect({"a": one_waits}, workers, where)["a"]
        leaver.join()
    assert [record.status for record in records] == ["ok"] * 3
    assert f"{dask.scheduler_address} has no worker left" in "".join(said)


def test_a_run_that_no_worker_can_take(inside, where):
    card, large = SQUARES.but(device="cuda"), SQUARES.but(train={"batch": 10_000_000})
    with cluster.opened(inside) as workers:
        assert not workers.has_card
        with pytest.raises(ValueError, match=r"needs a worker with GPU=1.*have MEMORY=2e\+09"):
            runs.collect({"a": [card]}, workers, where)
        with pytest.raises(ValueError, match=f'dask worker {inside} .*--resources "MEMORY='):
            runs.collect({"a": [large]}, workers, where)
        plan = missing({"a/one": {"card": [card]}}, where, Seconds(), card=True)
        outcome = filling.fill(plan, 60.0, workers, 1, where, lambda line: None)
    assert "needs a worker with GPU=1" in outcome.failures[0]


def test_what_a_run_asks_for(home):
    squares(home)
    content, _ = execute(SQUARES, str(home / "states"))
    counted = content["memory"]["total"] * 2**20
    assert 0.5 * counted < memory_of(SQUARES) < 2 * counted
    # the estimate that plans print
    assert needs.of(SQUARES) == {"MEMORY": needs.START_BYTES + memory_of(SQUARES)}
    assert needs.of(SQUARES.but(device="cuda"))["GPU"] == 1
    assert needs.of(SQUARES.but(train=None))["MEMORY"] < needs.of(SQUARES)["MEMORY"]


def test_resources_go_with_the_run(inside, where, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "execute", made_up)
    with cluster.opened(inside) as workers:
        real = workers.client.submit
        monkeypatch.setattr(
            workers.client, "submit", lambda *a, **k: asked.append(k["resources"]) or real(*a, **k)
        )
        runs.collect({"a": [SQUARES]}, workers, where)
    assert asked == [{"MEMORY": needs.of(SQUARES)["MEMORY"]}]


def on_other_data(spec, states, checkpoint=None):
    """A run of which each seed sees another digit of the data set's digest."""
    content, arrays = made_up(spec, states)
    seen = {"rows": {"train": 9}, "labels": {"train": [9]}, "digest": str(spec.seed)}
    return content | {"data": seen}, arrays


def test_workers_with_other_data_of_one_name(inside, where, monkeypatch):
    monkeypatch.setattr(runs, "execute", on_other_data)
    first, second = sorted((SQUARES.but(seed=seed) for seed in (0, 1)), key=lambda spec: spec.id)
    with cluster.opened(inside) as workers:
        with pytest.raises(RuntimeError, match=f"run {second.id}: ValueError: data set squares of"):
            runs.collect({"a": [first, second]}, workers, where)
    assert where.is_done(first.id) and not where.is_done(second.id)


def gives_it_back(spec, states, checkpoint=None):
    """A run that finds damaged weights wherever it is."""
    error = {"kind": "ValueError", "message": "vit.safetensors has SHA-256 1, expected 2"}
    return {"id": spec.id, "spec": spec.model_dump(mode="json")} | {
        "status": "failed",
        "error": error,
    }, {}


def test_damaged_weights_name_file_and_worker(inside, where, monkeypatch):
    monkeypatch.setattr(runs, "execute", gives_it_back)
    monkeypatch.delenv("MOE_WEIGHTS", raising=False)
    with cluster.opened(inside) as workers:
        [address] = workers.client.nthreads()
        with pytest.raises(RuntimeError) as said:
            runs.collect({"a": [SQUARES]}, workers, where)
    assert f"no worker can start it. worker {address} on" in str(said.value)
    assert "MOE_WEIGHTS=not set): vit.safetensors has SHA-256 1" in str(said.value)


# ---- schedulers and workers that are not as they should be


def test_a_scheduler_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no scheduler answered at {address}.*8786"):
            with cluster.opened(address):
                pass
    with pytest.raises(ConnectionError, match=f"no scheduler answered at {address}"):  # closed
        with cluster.opened(address):
            pass


@pytest.mark.parametrize(
    ("workers", "threads", "error"),
    [(0, 1, "has no workers: start one.*dask worker tcp"), (1, 3, "carries out 3 tasks at a time")],
)
def test_workers_that_cannot_compute(workers, threads, error):
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=threads,
        processes=False,
        dashboard_address=":0",
        protocol="tcp",
    ) as dask:
        with pytest.raises((ValueError, ConnectionError), match=error):
            with cluster.opened(dask.scheduler_address):
                pass


# ---- a cluster that a file describes


def test_a_cluster_of_this_machine(tmp_path):
    """The example starts, with what it says of its workers, which end with the block."""
    text = (EXAMPLES / "local.yaml").read_text().replace("n_workers: 2", "n_workers: 1")
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with cluster.opened(file=file) as workers:
        [said] = workers.client.run(_describe).values()
        [worker] = workers.client.scheduler_info()["workers"].values()
        assert (len(workers), worker["resources"]) == (1, {"MEMORY": 8e9})
        assert int(said["pid"]) != os.getpid()
    wait_until(lambda: not Path(f"/proc/{said['pid']}").exists(), "its end")


def _describe():
    from lib.runs import remote

    return remote.describe()
