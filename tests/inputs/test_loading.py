"""Reading ahead: the same batches from any number of processes, which end with the run, and say
what is wrong as the run itself does."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from data_folders import parquet
from PIL import Image

from lib.inputs import augment, loading, packed, sources
from lib.inputs.batches import Batches
from lib.inputs.splits import Wanted, load_splits
from lib.spec import DataSpec, RunSpec

KINDS = ("none", "flip", "shift", "flip_crop", "resized_crop", "auto")
ROOT = Path(__file__).parents[2]
COUNT = 22  # pictures of training


def pictures(folder: Path, count: int = COUNT) -> Path:
    """Writes JPEGs of two classes and of several shapes, with a test split of ten."""
    numbers = np.random.default_rng(0)
    for split, n in (("train", count), ("test", 10)):
        for i in range(n):
            file = folder / split / "ab"[i % 2] / f"{i:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
    return folder


def run_of(name: str, kind: str = "resized_crop") -> RunSpec:
    return RunSpec(data=DataSpec(name=name, image_size=16, augment=kind), seed=3)


def batches(split, run, count: int | None, monkeypatch, size: int = 6) -> list:
    """Two passes, the second without augmentation, read by `count` processes; None does not say."""
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    if count is not None:
        monkeypatch.setenv(loading.VARIABLE, str(count))
    parts = torch.arange(len(split)).split(size)  # the last one is smaller
    augmented = [Wanted(part, draws_of(number)) for number, part in enumerate(parts)]
    return list(split.batches([*augmented, *map(Wanted, parts)], run))


def draws_of(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def equal(one: list, other: list) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for both in pairs for a, b in zip(*both, strict=True))


# ---- the same images, whoever reads them


@pytest.mark.parametrize("kind", ["resized_crop", "flip_crop"])
def test_batches_are_bit_equal_for_0_1_and_4_processes(home, monkeypatch, kind):
    pictures(home / "set")
    run = run_of("set", kind)
    split = load_splits(run.data).train
    by_hand = [
        (part, split.batch(part, run, draws_of(number)))
        for number, part in enumerate(torch.arange(len(split)).split(6))
    ]
    here = batches(split, run, 0, monkeypatch)
    assert equal(here[:4], by_hand) and not equal(here[:4], here[4:])
    state = torch.get_rng_state()
    for count in (1, 4):
        assert equal(batches(split, run, count, monkeypatch), here)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["resized_crop", "flip_crop"])
def test_shares_of_a_batch_are_cut_out_of_the_whole(home, monkeypatch, kind):
    pictures(home / "set")
    run = run_of("set", kind)
    split = load_splits(run.data).train
    index = torch.arange(7)
    whole = split.batch(index, run, draws_of(1))
    for count in (0, 1):
        monkeypatch.setenv(loading.VARIABLE, str(count))
        shares = [Wanted(index, draws_of(1), share) for share in (slice(4), slice(4, 7))]
        (first, one), (second, other) = split.batches(shares, run)
        assert first.tolist() == [0, 1, 2, 3] and second.tolist() == [4, 5, 6]
        assert torch.equal(torch.cat([one, other]), whole)
        if count:  # the share alone was sent
            assert one.untyped_storage().nbytes() == one.nbytes
    read, image = [], split.source.image
    monkeypatch.setattr(split.source, "image", lambda row: read.append(row) or image(row))
    assert torch.equal(split.batch(index, run, draws_of(1), slice(4, 7)), whole[4:])
    assert read == split.rows[4 if kind == "resized_crop" else 0 : 7].tolist()
    [asked] = split._requests(shares[1:], run, deque())
    assert [job is None for job in asked.jobs] == [kind == "resized_crop"] * 4 + [False] * 3


def test_every_layout_is_read_by_another_process(home, monkeypatch):
    folder = pictures(home / "folders")
    for split, names in (("train", "ab"), ("test", "ba")):
        files = [sorted((folder / split / name).iterdir()) for name in names]
        rows = [(file.read_bytes(), label) for label, each in enumerate(files) for file in each]
        table = home / "tables" / f"{split}-00000-of-00001.parquet"
        parquet(table, [row[0] for row in rows], [row[1] for row in rows], list(names))
    samples = {"train": ["0", "1"], "valid": ["2"], "test": ["3"]}
    for name in "0123":
        (home / "bands").mkdir(exist_ok=True)
        with h5py.File(home / "bands" / f"{name}.hdf5", "w") as file:
            for number, band in enumerate(("Red", "Green", "Blue")):
                file[band] = np.full((5, 5), 50 * int(name) + number, np.uint8)
    (home / "bands" / "default_partition.json").write_text(json.dumps(samples))
    (home / "bands" / "label_map.json").write_text(json.dumps({"x": ["0", "2"], "y": ["1", "3"]}))
    opened = sources.sources_of("folders", "label", home)
    packed.write(packed.file_of(home, "hub:me/mine"), {"label": opened}, {"train": range(COUNT)})
    for name in ("folders", "tables", "bands", "hub:me/mine", "mnist5k"):
        source = sources.sources_of(name, "label", home)[0]["train"]
        job = pickle.dumps(source.job(1))
        assert len(job) < 2000 and torch.equal(pickle.loads(job)(), source.image(1))
        if name in ("tables", "hub:me/mine"):  # opened anew in the process
            split = load_splits(DataSpec(name=name, train=10)).train
            run = run_of(name, "flip")
            here, there = (batches(split, run, count, monkeypatch) for count in (0, 1))
            assert equal(here, there)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_passed_over_as_they_are_made(kind):
    generator, other = (torch.Generator().manual_seed(5) for _ in range(2))
    images = [torch.zeros(3, 9 + i % 2, 12, dtype=torch.uint8) for i in range(19)]
    augment.augmented(images, kind, 8, generator)
    augment.pass_over(kind, len(images), other)
    assert torch.equal(generator.get_state(), other.get_state())
    assert kind == "none" or generator.initial_seed() == 5
    fresh = torch.Generator().manual_seed(5).get_state()
    assert torch.equal(generator.get_state(), fresh) == (kind == "none")


def test_passes_that_are_left_early_draw_alike(monkeypatch):
    run = RunSpec(data=DataSpec(train=25, val=10, test=10, augment="shift"), seed=3)
    split, read = load_splits(run.data).train, []
    for count in (0, 2):
        monkeypatch.setenv(loading.VARIABLE, str(count))
        loader = Batches(split, run, size=4, shuffled=True)
        first = next(iter(loader))  # six more are under way where processes read
        read.append([first, *loader])
    assert len(read[0]) == 8 and equal(*read)


# ---- how many


def test_number_of_processes(monkeypatch):
    run = RunSpec()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert loading.processes(run) == loading.MOST
    assert loading.processes(run.but(threads=60)) == 4
    assert loading.processes(run.but(threads=64)) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert loading.processes(run.but(threads=4)) == 0
    assert loading.processes(run.but(threads=4, device="cuda")) == 3
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a pool")
    assert loading.processes(run) == 0
    monkeypatch.setenv(loading.VARIABLE, "12")
    assert loading.processes(run) == 12
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    with pytest.warns(UserWarning, match="MOE_LOADERS=12.* read in the run itself"):
        assert loading.processes(run) == 0
    for wrong in ("two", "-1", "1.5"):
        monkeypatch.setenv(loading.VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"MOE_LOADERS='{wrong}'.* 0 to read in the run"):
            loading.processes(run)


def test_only_what_does_not_stay_decoded_is_read_by_processes(home, monkeypatch):
    pictures(home / "set")
    run, counts, real = run_of("set"), [], loading.in_processes
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(run.threads + 1), raising=False)

    def watched(requests, count, pinned):
        counts.append((count, pinned))
        return real(requests, count, pinned)

    monkeypatch.setattr(loading, "in_processes", watched)
    split = load_splits(run.data).train
    here = batches(split, run, None, monkeypatch)
    assert not counts
    monkeypatch.setattr(sources, "CACHED_BYTES", len(split) * 20 * 24 * 3)  # some are larger
    sources.forget()
    assert equal(batches(load_splits(run.data).train, run, None, monkeypatch), here)
    assert counts == [(1, False)]
    assert list(split.batches([], run)) == []


# ---- what goes wrong


def test_damaged_picture_is_named_when_its_turn_comes(home, monkeypatch):
    damaged = sorted((pictures(home / "set") / "train" / "b").iterdir())[-1]
    damaged.write_bytes(damaged.read_bytes()[:200])
    run = run_of("set")
    split, messages = load_splits(run.data).train, []
    wanted = list(map(Wanted, torch.arange(len(split)).split(6)))
    for count in (0, 2):
        monkeypatch.setenv(loading.VARIABLE, str(count))
        ahead = split.batches(wanted, run)
        for _ in range(3):
            next(ahead)
        with pytest.raises(ValueError, match=f"{damaged} does not decode") as caught:
            next(ahead)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


class Odd(Exception):
    """Is pickled, and cannot be made anew."""

    def __init__(self, one, two):
        super().__init__(one)


def request(job) -> loading.Request:
    one = torch.ones(1, 3, 1, 1)
    return loading.Request([job] * 4, "none", 64, None, one, one)


def black() -> torch.Tensor:
    return torch.zeros(3, 64, 64, dtype=torch.uint8)


def odd() -> torch.Tensor:
    raise Odd("nothing", "to see")


def without_room() -> torch.Tensor:
    """A picture, after which this process may write files of 10,000 bytes at most."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    return black()


@pytest.mark.parametrize(
    "job, message",
    [(odd, "Odd: nothing"), (without_room, "does not fit into shared memory .*MOE_LOADERS=1")],
)
def test_errors_of_the_processes_arrive(job, message):
    ahead = loading.in_processes(map(request, [black, job, black]), 1, pinned=False)
    next(ahead)
    with pytest.raises(RuntimeError, match=message):
        next(ahead)


def test_what_cannot_be_asked_for_is_an_error_when_its_turn_comes():
    jobs = [black, lambda: black(), black]
    ahead = loading.in_processes(map(request, jobs), 1, pinned=False)
    next(ahead)
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        next(ahead)


def test_a_killed_process_is_told_with_what_to_do():
    ahead = loading.in_processes(map(request, [black] * 50), 1, pinned=False)
    next(ahead)
    [process] = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="was killed .*shared memory .*MOE_LOADERS=1"):
        list(ahead)
    assert not multiprocessing.active_children()


# a script without a guard, whose processes must not run it again
SCRIPT = """
import multiprocessing, signal, time
from functools import partial

import torch
from lib.inputs import loading

# a shell that starts a command in the background lets it ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
one = torch.ones(1, 3, 1, 1)
jobs = [partial(torch.zeros, 3, 8, 8, dtype=torch.uint8)] * 4
requests = [loading.Request(jobs, "none", 8, None, one, one)] * 1000
print("started", flush=True)
for batch in loading.in_processes(requests, 2, False):
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    pids = [process.pid for process in multiprocessing.active_children()]
    print(*pids, server, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_run(number, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout.readline() == "started\n"
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 3 and all(map(alive, pids))
    # a terminal sends Ctrl-C to all of them
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
    out, errors = run.communicate(timeout=60)
    until = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids)) and out == "" and run.returncode
    assert errors.count("Traceback") == (number == signal.SIGINT)  # of the run alone


def alive(pid: int) -> bool:
    """Tells whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
