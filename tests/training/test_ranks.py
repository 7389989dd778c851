"""Two processes with a share of every batch each, against one with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_process import (
    BASE,
    DIVERGING,
    KILLED,
    NO_MEMORY,
    RESUMED,
    SPECS,
    STOP,
    broken_off_at,
    no_memory,
)

from lib.runs import checks, execute, states
from lib.runs import collect as runs
from lib.runs.store import Store
from lib.spec import MoESpec
from lib.training import checkpoint, loop, ranks
from lib.training.draws import DrawsOfWholeBatch

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
# Seen: at most 2.3e-6 (a key bias, whose gradient is rounding alone), 9e-7 elsewhere.
TOLERANCE = 1e-5


class Stopped(KeyboardInterrupt):
    """Not an Exception: like Ctrl-C it goes through `execute`."""


def stop():
    raise Stopped


def started(cache: Path) -> list[subprocess.Popen]:
    """Starts the ranks, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "rank_process.py")]
    shared = {
        "PYTHONPATH": str(ROOT),
        "MOE_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]


def ended(processes: list[subprocess.Popen]) -> list[SimpleNamespace]:
    """Waits for the ranks; returns what each printed, and its status."""
    said = [process.communicate(timeout=300) for process in processes]
    return [
        SimpleNamespace(out=out, err=err, status=process.returncode)
        for process, (out, err) in zip(processes, said, strict=True)
    ]


def broken_off(spec, file: Path) -> None:
    """Leaves the checkpoint of one process, stopped before step STOP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "losses", loop.losses)  # what is put there goes again
        patch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
        patch.setattr(checkpoint, "WRITE_SHARE", 0)
        broken_off_at(spec.seed, STOP, stop)
        with pytest.raises(Stopped):
            execute.execute(spec, str(file.parent / "states"), str(file))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The stores of one process and of two, after all runs; and what the two said."""
    root = tmp_path_factory.mktemp("ranks")
    one, two = (Store(root / "none", root / name) for name in ("one", "two"))
    file = two.checkpoint(RESUMED.id)
    file.parent.mkdir(parents=True)
    broken_off(RESUMED, file)
    processes = started(root / "two")
    try:
        specs = [*SPECS.values(), RESUMED, KILLED]
        runs.collect({"runs": specs}, where=one)
        with pytest.raises(RuntimeError, match="Diverged"):
            runs.collect({"runs": [DIVERGING]}, where=one)
        said = ended(processes)
    finally:
        for process in processes:
            process.kill()
    return SimpleNamespace(one=one, two=two, said=said)


def assert_equal_runs(spec, one: Store, two: Store) -> None:
    """Compares weights, history and curve of two stores, up to rounding."""
    first, second = one.get(spec), two.get(spec)
    assert second.status == "ok", second.content.get("error")
    weights = [states.read(spec, store.states)[0] for store in (one, two)]
    torch.testing.assert_close(*weights, rtol=0, atol=TOLERANCE)
    assert len(first.history) == len(second.history)
    for before, now in zip(first.history, second.history, strict=True):
        assert now == pytest.approx(before, rel=0, abs=TOLERANCE)
    assert second.curve["step"] == first.curve["step"]
    assert second.curve["loss"] == pytest.approx(first.curve["loss"], rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("name", SPECS)
def test_two_ranks_train_as_one_process(both, name):
    spec = SPECS[name]
    assert_equal_runs(spec, both.one, both.two)
    timing, steps = both.two.get(spec).timing, both.one.get(spec).curve["step"][-1]
    assert timing.get("ranks") == (None if name == "capacity" else RANKS)
    images = timing["train_images_per_s"] * timing["train_seconds"]
    assert round(images) == 65 * steps / 5  # of both ranks
    moved = both.one.get(spec).weights
    assert moved["start"] != moved["final"]


def test_a_run_that_cannot_be_shared_out_says_so(both):
    (line,) = [line for line in both.said[0].err.splitlines() if "alone" in line]
    assert SPECS["capacity"].id in line and "moe.capacity_factor=1 limits the tokens" in line


def test_two_ranks_go_on_from_the_checkpoint_of_one_process(both):
    assert_equal_runs(RESUMED, both.one, both.two)
    (row,) = both.two.get(RESUMED).resumed
    assert row["step"] == STOP and row["differs"]["ranks"] == [1, RANKS]


def test_a_killed_rank_ends_the_other_and_one_process_goes_on_from_their_checkpoint(both):
    first, second = both.said
    assert second.status == -9
    assert first.status == 0 and "RuntimeError: another rank is gone" in first.out
    assert both.two.get(KILLED) is None  # no failure of the run
    assert both.two.checkpoint(KILLED.id).is_file()
    runs.collect({"killed": [KILLED]}, where=both.two)
    assert_equal_runs(KILLED, both.one, both.two)
    (row,) = both.two.get(KILLED).resumed
    assert row["step"] == STOP and row["differs"]["ranks"] == [RANKS, 1]


def test_an_error_of_one_rank_is_filed_and_the_other_runs_go_on(both):
    error = both.two.get(NO_MEMORY).error
    assert error["kind"] == "RankFailed"
    assert "rank 1: OutOfMemoryError: CUDA out of memory" in error["message"]
    assert "a smaller train.batch" in error["message"]
    assert f"rank 1, run {NO_MEMORY.id}: OutOfMemoryError" in both.said[1].err
    # loss and ranks are in step there: both stop by themselves
    diverged = [store.get(DIVERGING).error for store in (both.one, both.two)]
    assert diverged[0]["kind"] == diverged[1]["kind"] == "Diverged"
    assert diverged[0]["step"] == diverged[1]["step"]
    assert "Runs that failed: 2" in both.said[0].out


def test_ranks_that_disagree_end_with_an_error_that_names_both(both):
    ids = [BASE.but(seed=10 + rank).id for rank in range(RANKS)]
    for rank in both.said:
        assert (
            f"ValueError: ranks disagree on the runs: rank 0 has {ids[0]}, rank 1 has {ids[1]}"
        ) in rank.out


# ---- the parts, in this process


def rank_of(count: int, rank: int) -> ranks.Ranks:
    """A rank that is connected with nobody."""
    alone = object.__new__(ranks.Ranks)
    alone.count, alone.rank = count, rank
    return alone


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_make_up_the_batch(count):
    for images in range(1, 12):
        all_ranks = [rank_of(count, rank) for rank in range(count)]
        taken = [rank.share_of(images) for rank in all_ranks]
        for rank in all_ranks:
            rank.take(images)
        assert [n for rank in all_ranks for n in range(images)[rank.share]] == [*range(images)]
        sizes = [rank.share.stop - rank.share.start for rank in all_ranks]
        assert max(sizes) - min(sizes) <= 1
        assert all(len(range(images)[share]) >= 1 for share in taken)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            [{"code": "a1", "runs": ["x"]}, {"code": "b2", "runs": ["x"]}],
            "code: .* a1, .* 1 has b2",
        ),
        ([{"runs": ["x", "y"]}, {"runs": ["x", "z"]}], "runs: rank 0 has y, rank 1 has z"),
        ([{"runs": ["x"]}, {"runs": ["x", "z"]}], "runs: rank 0 has none, rank 1 has z"),
        ([{"data": {"rows": 9}}, {"data": None}], "data: rank 0 has {'rows': 9}, rank 1 has None"),
    ],
)
def test_what_ranks_disagree_on_is_named(monkeypatch, facts, message):
    rank = rank_of(2, 1)
    monkeypatch.setattr(rank, "meet", lambda mine: [facts[0], mine])
    with pytest.raises(ValueError, match=message):
        rank.agree(**facts[1])
    rank.agree(**facts[0])


def drawn(draw, share: slice | None, images: int, members: int = 1):
    """What is drawn for a share of a batch; for all of it, without the ranks, if None."""
    torch.manual_seed(0)
    if share is None:
        return draw(images)
    with DrawsOfWholeBatch(share, images, members):
        return draw(share.stop - share.start)


@pytest.mark.parametrize(
    "draw",
    [
        lambda b: torch.rand(b),
        lambda b: torch.rand(b, 4, generator=None),
        lambda b: torch.rand((b, 4)),
        lambda b: torch.randn_like(torch.empty(b, 6)),
        lambda b: torch.empty(b, 1, 1).bernoulli_(0.5),
        lambda b: torch.randn_like(torch.empty(b * 3, 6)).view(b, 3, 6),
    ],
    ids=["rand", "rand of two axes", "rand of a shape", "randn_like", "bernoulli_", "tokens"],
)
def test_a_share_draws_what_one_process_draws_for_it(draw):
    whole = drawn(draw, None, 7)
    for share in (slice(0, 3), slice(3, 7)):
        assert torch.equal(drawn(draw, share, 7), whole[share])
    one_for_all = drawn(lambda b: torch.rand(()), slice(0, 3), 7)
    assert one_for_all == drawn(lambda b: torch.rand(()), None, 7)


def test_a_share_of_an_ensemble_draws_for_each_member():
    def draw(b):
        before = torch.rand(b)  # the batch is not repeated yet
        return before, torch.randn_like(torch.empty(2 * b * 3, 6)).view(2, b, 3, 6)

    whole = drawn(draw, None, 5, members=2)
    for share in (slice(0, 2), slice(2, 5)):
        before, after = drawn(draw, share, 5, members=2)
        assert torch.equal(before, whole[0][share]) and torch.equal(after, whole[1][:, share])


@pytest.mark.parametrize(
    ("moe", "model", "reason"),
    [
        ({"capacity_factor": 1.25}, None, "moe.capacity_factor=1.25"),
        ({"router": "priority", "group": "batch"}, None, "moe.group='batch'"),
        ({}, torch.nn.BatchNorm2d(3), "batch normalisation"),
        ({}, None, None),
    ],
    ids=["capacity", "batch as pool", "batch normalisation", "shared out"],
)
def test_what_would_depend_on_the_number_of_ranks_is_trained_by_one(
    monkeypatch, recwarn, moe, model, reason
):
    several = rank_of(2, 0)
    monkeypatch.setattr(ranks, "_here", several)
    spec = BASE.but(moe=MoESpec(**{"layers": 1, "router": "token"} | moe))
    got = ranks.of(spec, model or torch.nn.Linear(2, 2))
    assert got is (several if reason is None else ranks.ONE)
    # without what another test left open
    said = [str(one.message) for one in recwarn if not issubclass(one.category, ResourceWarning)]
    assert [reason in message for message in said] == [True] * bool(reason)


def test_more_ranks_than_cards_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 ranks were started on a machine with 1"):
        checks.check_device(BASE.but(device="cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    checks.check_device(BASE.but(device="cuda"))


def test_a_run_that_does_not_fit_its_card_says_what_takes_less(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "losses", lambda *_: no_memory())
    content, _ = execute.execute(NO_MEMORY, str(tmp_path))
    assert content["error"]["kind"] == "OutOfMemoryError"
    assert (
        "Tried to allocate 2.00 GiB. The run does not fit the card" in content["error"]["message"]
    )
