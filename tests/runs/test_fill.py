"""What is missing, in which order, and filling it inside a budget: with made-up runs by hand, and
with tiny ones from the command line, killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from lib import paths
from lib.pages import all_verdicts, missing
from lib.runs import collect as runs
from lib.runs import fill as filling
from lib.runs import locks
from lib.runs import order as order_of_runs
from lib.runs.estimate import Estimate
from lib.runs.order import DECIDED_PILOT, OPEN_CLAIM, OTHER, Purpose
from lib.runs.store import Store
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec
from lib.training.checkpoint import Checkpoint

TINY = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    threads=1,
)


class Given:
    """Estimates that a test gives, in seconds by seed; 1 where it gives none."""

    def __init__(self, seconds):
        self.seconds = seconds

    def of(self, spec):
        return Estimate(self.seconds.get(spec.seed, 1.0), "given")

    def images(self, spec):
        return spec.data.train, spec.data.val, spec.data.test


def planned(grid, where, seconds=None, card=False):
    """The plan of one page."""
    return order_of_runs.missing({"a/one": grid}, where, Given(seconds or {}), card)


def seeds(items):
    return [item.spec.seed for item in items]


def filled(plan, where, budget=1000.0, workers=1):
    """Fills with threads in the place of processes."""
    lines = []
    with ThreadPoolExecutor(workers) as executor:
        outcome = filling.fill(plan, budget, executor, workers, where, lines.append)
    return outcome, lines


@pytest.fixture
def computed(monkeypatch):
    """Runs are made up; returns the seeds computed so far, in the order of their starts."""

    class Log(list):
        bad: set[int] = set()

    log = Log()

    def execute(spec, states, checkpoint=None):
        log.append(spec.seed)
        head = {"id": spec.id, "spec": spec.model_dump(mode="json")}
        if spec.seed in log.bad:
            return head | {
                "status": "failed",
                "error": {"kind": "ValueError", "message": "bad"},
            }, {}
        state = Store(paths.RESULTS, Path(states).parent).state(spec.id)
        if spec.keep:
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text("weights")
        weights = {"final": str(spec.seed), "parent": spec.init and str(spec.init.seed)}
        return head | {"status": "ok", "test": {"top1": 50.0}, "weights": weights}, {}

    monkeypatch.setattr(runs, "execute", execute)
    return log


# ---- in which order


def test_what_serves_most_an_hour_comes_first():
    arms = [
        Purpose("a", "slow", ("s",)),
        Purpose("a", "two", ("x", "y")),
        Purpose("b", "one", ("y",)),
    ]
    # "two" completes itself and "one" in 25 s, "one" itself in 10: 0.08 and 0.1 a second
    assert order_of_runs.in_order(arms, {"s": 100.0, "x": 15.0, "y": 10.0}) == ["y", "x", "s"]
    # 2 in 18 s is more than 1 in 10
    assert order_of_runs.in_order(arms, {"s": 100.0, "x": 8.0, "y": 10.0}) == ["x", "y", "s"]
    # equals: the first page, the first arm
    equal = [Purpose("a", "1", ("p",)), Purpose("b", "2", ("q",)), Purpose("b", "3", ("r",))]
    assert order_of_runs.in_order(equal, {"p": 7.0, "q": 7.0, "r": 6.0}) == ["r", "p", "q"]


def test_a_claim_is_worth_more_than_an_arm():
    purposes = [Purpose("a", "cheap", ("x",), OTHER), Purpose("a", "claim A1", ("y",))]
    assert order_of_runs.in_order(purposes, {"x": 1.0, "y": 20.0}) == ["y", "x"]
    # unless an hour of it is: 1 in 200 s is less than 0.01 in 1
    assert order_of_runs.in_order(purposes, {"x": 1.0, "y": 200.0}) == ["x", "y"]


def test_a_claim_takes_the_place_of_its_arms(where, computed):
    grid = {name: [TINY.but(seed=s)] for name, s in (("few", 1), ("many", 2), ("other", 3))}
    claims = {"A1": ("a/one", ("few", "many")), "B1": ("b/one", ("few",))}
    plan = order_of_runs.missing(
        {"a/one": grid}, where, Given({1: 9.0, 2: 9.0, 3: 1.0}), False, claims
    )
    assert [str(p) for p in plan.purposes] == ["a/one: claim A1", "a/one: other"]
    assert seeds(plan.items) == [1, 2, 3]  # 1 in 18 s before 0.01 in 1
    assert [str(p) for p in plan.items[1].serves] == ["a/one: claim A1"]
    assert [p.name for p in plan.served_after([s.id for s in grid["other"]])] == ["other"]
    # a claim whose verdict stands waits as an arm does: 1 in 18 s after 1 in 1
    times = Given({1: 9.0, 2: 9.0, 3: 1.0})
    plan = order_of_runs.missing({"a/one": grid}, where, times, False, claims, {"A1": True})
    assert seeds(plan.items) == [3, 1, 2]


def test_a_claim_that_a_pilot_decides_waits_for_open_ones_alone(where):
    grid = {name: [TINY.but(seed=n)] for n, name in enumerate(["settled", "pilot", "open", "arm"])}
    claims = {name: ("a/one", (name,)) for name in ("settled", "pilot", "open")}
    decided = {"settled": True, "pilot": False}
    plan = order_of_runs.missing({"a/one": grid}, where, Given({}), False, claims, decided)
    assert seeds(plan.items) == [2, 1, 0, 3]
    assert [p.worth for p in plan.purposes] == [OTHER, DECIDED_PILOT, OPEN_CLAIM, OTHER]
    # it is worth an hour where an open one takes more than ten
    slow = order_of_runs.missing({"a/one": grid}, where, Given({2: 11.0}), False, claims, decided)
    assert seeds(slow.items) == [1, 2, 0, 3]
    shown = missing.listing(plan, 2.0, 1)
    assert "1 of 1 open claims, 1 of 1 claims with a pilot's verdict, 0 of 2 others" in shown


def test_without_a_built_page_all_claims_are_said_to_count_as_open(where, tmp_path, monkeypatch):
    monkeypatch.setattr(all_verdicts, "ROOT", tmp_path)
    grid, claims = {"arm": [TINY]}, {"A1": ("a/one", ("arm",))}
    plan = order_of_runs.missing({"a/one": grid}, where, Given({}), False, claims)
    line = "all claims count as open, since book/claims.json is not there: `make book` writes it\n"
    assert missing.listing(plan, 9.0, 1).startswith(line)
    assert missing.listing(plan, 0.0, 1).startswith(line)
    assert "claims.json" not in missing.listing(planned(grid, where), 9.0, 1)  # none is asked
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "claims.json").write_text("[]")
    assert "claims.json" not in missing.listing(plan, 9.0, 1)


def test_arms_get_their_first_seeds_first_and_cost_what_the_rest_lack(where, computed):
    grid = {
        "three": [TINY.but(seed=s) for s in (1, 2, 3)],
        "two": [TINY.but(seed=s) for s in (4, 5)],
    }
    plan = planned(grid, where, {1: 8.0})
    assert seeds(plan.items) == [4, 1, 5, 2, 3]  # a slow first seed before a quick second one
    assert [str(p) for p in plan.items[0].serves] == ["a/one: two, first seed", "a/one: two"]
    assert [str(p) for p in plan.items[2].serves] == ["a/one: two"]
    # two arms lack runs: one has all of its own then, the other its first seed alone
    shown = missing.listing(plan, 11.0, 1)
    assert "complete then: 1 of 2 others that lack runs" in shown
    runs.collect({"three": grid["three"][:2], "two": grid["two"][1:]}, where=where)
    assert missing.listing(planned({}, where, {}), 11.0, 1).endswith("nothing is missing")
    plan = planned(grid, where, {3: 1.5})
    assert seeds(plan.items) == [4, 3]  # both have a row: what completes an arm an hour
    assert [str(arm) for arm in plan.items[1].serves] == ["a/one: three"]


def test_parents_without_weights_come_first_and_count(where, computed):
    parent = TINY.but(seed=1)
    grid = {"child": [TINY.but(seed=2, init=parent)], "other": [TINY.but(seed=3)]}
    plan = planned(grid, where, {1: 5.0, 2: 1.0, 3: 4.0})  # 6 s for the child, 4 for the other
    assert seeds(plan.items) == [3, 1, 2] and plan.items[1].spec.keep
    assert plan.items[2].needs == {parent.id} and plan.items[1].needs == set()
    runs.collect({"parent": [parent.but(keep=True)]}, where=where)
    assert seeds(planned(grid, where, {1: 5.0, 2: 1.0, 3: 4.0}).items) == [2, 3]
    where.state(parent.id).unlink()  # its record is there, and it has to be computed again
    plan = planned(grid, where, {1: 5.0, 2: 1.0, 3: 4.0})
    assert seeds(plan.items) == [3, 1, 2]
    filled(plan, where)
    assert planned(grid, where).items == ()
    assert computed == [1, 3, 1, 2]


def test_what_needs_a_card_is_left_out_where_there_is_none(where):
    parent = TINY.but(seed=1, device="cuda")
    grid = {
        "card": [TINY.but(seed=2, device="cuda")],
        "child of a card's": [TINY.but(seed=3, init=parent, device="cuda")],
        "processor": [TINY.but(seed=4)],
    }
    plan = planned(grid, where)
    assert seeds(plan.items) == [4]
    assert [arm.name for arm in plan.without_card] == ["card", "child of a card's"]
    assert seeds(planned(grid, where, card=True).items) == [2, 4, 1, 3]


def test_seeds_of_a_claim_do_not_wait_for_a_card(where, computed):
    few, many = ([TINY.but(seed=s, device="cuda", threads=n) for s in (1, 2)] for n in (1, 2))
    parent = TINY.but(seed=9, device="cuda")
    grid = {
        "few": few,
        "many": many,
        "one model": [parent],
        "its children": [TINY.but(seed=s, init=parent, device="cuda") for s in (3, 4)],
        "no claim": [TINY.but(seed=5, device="cuda")],
    }
    claims = {"A1": ("a/one", ("few", "many")), "A2": ("a/one", ("its children", "one model"))}
    times = Given({})
    # as if a card had computed the first seed of one side
    record = {"id": few[0].id, "spec": few[0].model_dump(mode="json"), "status": "ok"}
    where.put(
        record | {"test": {"top1": 50.0}, "weights": {"final": "", "parent": None}}, {}, few[0]
    )
    plan = order_of_runs.missing({"a/one": grid}, where, times, False, claims)
    wanted = [few[1].on("cpu"), *(run.on("cpu") for run in many)]
    assert [item.spec.id for item in plan.items] == [run.id for run in wanted]
    assert [p.name for p in plan.without_card] == ["claim A2", "no claim"]
    filled(plan, where)
    there = runs.load({"few": few, "many": many}, where, any_device=True)
    assert [r.spec.device for r in there["few"]] == ["cuda", "cpu"]
    assert [r.spec.device for r in there["many"]] == ["cpu", "cpu"]
    assert order_of_runs.missing({"a/one": grid}, where, times, False, claims).items == ()
    strict = runs.load({"few": few, "many": many}, where)
    assert [r and r.spec.device for r in strict["few"]] == ["cuda", None]


def test_what_another_process_computes_is_left_to_it(where):
    grid = {"a": [TINY.but(seed=1)], "b": [TINY.but(seed=2)]}
    with locks.held(where.lock(TINY.but(seed=1).id)):
        plan = planned(grid, where)
        assert seeds(plan.items) == [2] and plan.elsewhere == (TINY.but(seed=1).id,)
    assert seeds(planned(grid, where).items) == [1, 2]


def test_a_checkpoint_makes_a_run_shorter(where):
    spec = TINY.but(seed=1, train=TrainSpec(epochs=2.0, batch=16))  # 8 steps
    [item] = planned({"a": [spec]}, where, {1: 80.0}).items
    assert item.estimate.seconds == 80.0
    Checkpoint(where.checkpoint(spec.id)).write({"step": 6})
    [item] = planned({"a": [spec]}, where, {1: 80.0}).items
    assert item.estimate.seconds == pytest.approx(20.0)


# ---- inside a budget


def test_the_schedule_ends_in_its_budget(where):
    grid = {f"arm {s}": [TINY.but(seed=s)] for s in (1, 2, 3)}
    plan = planned(grid, where, {1: 10.0, 2: 50.0, 3: 10.0})
    scheduled = {
        (budget, workers): seeds(plan.schedule(budget, workers))
        for budget, workers in ((0, 1), (25, 1), (60, 1), (70, 1), (60, 2))
    }
    assert scheduled == {
        (0, 1): [],
        (25, 1): [1, 3],
        (60, 1): [1, 3],  # 40 s are left, and the third takes 50
        (70, 1): [1, 3, 2],
        (60, 2): [1, 3, 2],  # both are done after 10 s
    }
    done = {item.spec.id for item in plan.schedule(25)}
    assert [arm.name for arm in plan.served_after(done)] == ["arm 1", "arm 3"]


def test_a_child_is_not_started_before_its_parent_is_done(where):
    parent = TINY.but(seed=1)
    plan = planned({"a": [TINY.but(seed=2, init=parent)]}, where, {1: 10.0, 2: 10.0})
    assert seeds(plan.schedule(15, workers=2)) == [1]
    assert seeds(plan.schedule(20, workers=2)) == [1, 2]


@pytest.mark.parametrize("workers", [1, 3])
def test_everything_is_filed_once_and_parents_first(where, computed, workers):
    parent = TINY.but(seed=1)
    grid = {"a": [TINY.but(seed=s, init=parent) for s in (2, 3)], "b": [TINY.but(seed=4)]}
    plan = planned(grid, where, {4: 0.5})
    outcome, lines = filled(plan, where, workers=workers)
    assert sorted(outcome.filed) == sorted(item.spec.id for item in plan.items)
    assert sorted(computed) == [1, 2, 3, 4] and computed.index(1) < computed.index(2)
    if workers == 1:
        assert computed == seeds(plan.schedule(1000)) == [4, 1, 2, 3]
    assert len(lines) == 4 and outcome.failures == outcome.interrupted == []
    assert planned(grid, where).items == () and where.get(parent).status == "ok"


def test_a_budget_that_is_too_small_starts_nothing(where, computed):
    plan = planned({"a": [TINY.but(seed=1)], "b": [TINY.but(seed=2)]}, where, {1: 50.0, 2: 60.0})
    assert filled(plan, where, budget=0.0)[0].filed == []
    assert filled(plan, where, budget=49.0)[0].filed == [] and computed == []


TRAINED = TINY.but(train=TrainSpec(epochs=1.0, batch=16))


def test_what_trains_is_begun_where_nothing_ends_within_the_budget(where):
    parent = TRAINED.but(seed=2)
    grid = {
        "no checkpoint": [TINY.but(seed=1)],
        "child": [TRAINED.but(seed=3, init=parent)],
        "other": [TRAINED.but(seed=4)],
        "quick child": [TINY.but(seed=5, init=parent)],
    }
    times = {1: 20.0, 2: 30.0, 3: 40.0, 4: 90.0, 5: 1.0}
    plan = planned(grid, where, times)
    scheduled = {
        (budget, workers): seeds(plan.schedule(budget, workers))
        for budget, workers in ((0, 1), (15, 1), (15, 3), (25, 1), (25, 2))
    }
    assert scheduled == {
        (0, 1): [],
        (15, 1): [2],  # 5 would end, and does not start without 2
        (15, 3): [2, 4],  # 3 cannot start
        (25, 1): [1],  # one ends: what is left waits
        (25, 2): [1],
    }
    shown = missing.listing(plan, 15.0, 1)
    assert shown.splitlines()[1].split()[:2] == [parent.id, "2"]
    assert (
        "nothing that is missing ends within the budget: 1 run is begun and interrupted, and the "
        "next start goes on from the checkpoint\n"
    ) in shown
    assert "complete then: 0 of 4 others" in shown and "still missing then: 5 runs" in shown
    assert "2 runs are begun" in missing.listing(plan, 15.0, 3)
    assert "begun" not in missing.listing(plan, 25.0, 1)
    alone = planned({"no checkpoint": grid["no checkpoint"]}, where, times)
    nothing = "ends within the budget, and no run is begun: give a longer --budget"
    assert nothing in missing.listing(alone, 15.0, 1) and nothing in missing.listing(plan, 0.0, 1)


def test_a_run_longer_than_the_budget_is_interrupted_and_the_next_start_goes_on(
    where, computed, monkeypatch
):
    end, real = threading.Event(), runs.execute

    def execute(spec, *folders):
        if spec.seed == 2 and not end.is_set():  # as training does, after a while
            Checkpoint(where.checkpoint(spec.id)).write({"step": 3})
            end.wait(30)
        return real(spec, *folders)

    monkeypatch.setattr(runs, "execute", execute)
    grid = {"fails": [TRAINED.but(seed=1)], "long": [TRAINED.but(seed=2)]}
    grid |= {"longer": [TRAINED.but(seed=3)], "no checkpoint": [TINY.but(seed=4)]}
    times, lines = {1: 60.0, 2: 100.0, 3: 200.0, 4: 50.0}, []
    computed.bad.add(1)
    runs.check(TINY)  # the first look at an architecture takes a while
    with ThreadPoolExecutor(1) as executor:
        plan = planned(grid, where, times)
        outcome = filling.fill(plan, 5.0, executor, 1, where, lines.append)
        end.set()
    # one that fails at once does not stand in the way of the next
    assert outcome.filed == [] and len(outcome.failures) == 1
    assert outcome.interrupted == [TRAINED.but(seed=2).id]
    begun = [line for line in lines if "ends within the budget" in line]
    assert len(begun) == 2 and f"{TRAINED.but(seed=2).id} (a/one: long) is begun" in begun[1]
    left = {item.spec.seed: item.estimate.seconds for item in planned(grid, where, times).items}
    assert left == {1: 60.0, 2: pytest.approx(25.0), 3: 200.0, 4: 50.0}
    outcome, lines = filled(planned(grid, where, times), where, budget=30.0)
    assert outcome.filed == [TRAINED.but(seed=2).id] and len(lines) == 1


def test_a_run_that_outlives_the_budget_is_interrupted(where, computed, monkeypatch):
    end, real = threading.Event(), runs.execute

    def execute(spec, *folders):
        if spec.seed == 2:
            end.wait(30)
        return real(spec, *folders)

    monkeypatch.setattr(runs, "execute", execute)
    grid = {"a": [TINY.but(seed=1)], "b": [TINY.but(seed=2)], "c": [TINY.but(seed=3)]}
    plan = planned(grid, where, {1: 0.1, 2: 0.2, 3: 0.3})
    runs.check(TINY)  # the first look at an architecture takes a while
    with ThreadPoolExecutor(1) as executor:
        began = time.monotonic()
        outcome = filling.fill(plan, 3.0, executor, 1, where, lambda line: None)
        assert time.monotonic() - began < 10
        assert outcome.filed == [TINY.but(seed=1).id]
        assert outcome.interrupted == [TINY.but(seed=2).id]
        assert runs.status_of(TINY.but(seed=2), where) == "missing"  # its lock is free
        end.set()
    assert where.find(TINY.but(seed=2).id) is None  # what comes after the end is not filed
    outcome, _ = filled(planned(grid, where), where)
    assert computed == [1, 2, 2, 3] and len(outcome.filed) == 2


def test_a_failing_run_does_not_stop_the_others(where, computed):
    computed.bad.add(1)
    grid = {str(s): [TINY.but(seed=s)] for s in (1, 2)}
    grid["unfit"] = [TINY.but(seed=3, backbone={"patch": 5})]
    outcome, _ = filled(planned(grid, where), where)
    assert outcome.filed == [TINY.but(seed=2).id] and computed == [1, 2]
    failed, unfit = sorted(outcome.failures, key=lambda line: "patch" in line)
    assert failed == f"run {TINY.but(seed=1).id}: ValueError: bad"
    assert "image_size=28 is not a multiple of the patch size 5" in unfit


def test_a_lost_worker_ends_the_filling(where, computed):
    class Broken:
        def submit(self, function, *arguments):
            job = Future()
            job.set_exception(BrokenProcessPool("a process died"))
            return job

    plan = planned({str(s): [TINY.but(seed=s)] for s in (1, 2)}, where)
    outcome = filling.fill(plan, 100.0, Broken(), 1, where, lambda line: None)
    assert computed == []  # nothing is computed in this process, where nothing could stop it
    [failure] = outcome.failures
    assert "worker was lost (a process died)" in failure and outcome.filed == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("1.5m", 90), ("0", 0)]
)
def test_budgets(text, seconds):
    assert filling.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["2", "2 h", "h", "", "2d", "-1h"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match="is no time: give hours, minutes or seconds"):
        filling.seconds_of(text)


# ---- workers

ORPHANS = """
import os, signal, sys, time
from pathlib import Path
from lib.runs.collect import pool

def work(file):
    Path(file).write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    pool(1).submit(work, sys.argv[1])
    while not Path(sys.argv[1]).exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_process_that_opened_the_pool(tmp_path):
    script, file = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(ORPHANS)
    env = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    subprocess.run([sys.executable, str(script), str(file)], env=env, timeout=120)
    worker, deadline = int(file.read_text()), time.monotonic() + 30
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(process: int) -> bool:
    try:  # one that has ended and that nobody has waited for is not alive
        state = (Path("/proc") / str(process) / "stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


# ---- from the command line, with runs that are computed

SPECS = """import lib
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec

p = lib.profile("{key}", profile, width=width, scale=scale, layers=layers)


def grid(p):
    run = RunSpec(
        data=DataSpec(train=64, val=20, test=30),
        backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
        train=TrainSpec(epochs=float(p.width), batch=16),
        threads=1,
    )
    return {{f"arm {{s}}": [run.but(seed=s)] for s in p.layers}}
"""


@pytest.fixture
def book(tiny):
    """A book of one page with three short runs, each of which has a checkpoint after every step."""
    tiny.contents("notebooks/a/one")
    tiny.notebook("a/one", specs=SPECS)
    tiny.profile("smoke", "a/one: {width: 12, layers: [0, 1, 2]}\n")
    file = tiny.root / "lib" / "training" / "checkpoint.py"
    text = file.read_text()
    for old in ("CHECKPOINT_SECONDS = 60", "WRITE_SHARE = 20"):
        assert old in text
        text = text.replace(old, f"{old.split()[0]} = 0")
    file.write_text(text)
    return tiny


def fill_command(book, *options):
    """Starts `python -m lib fill` in a book."""
    env = {**os.environ, "PYTHONPATH": str(book.root), "MOE_CACHE": str(book.root / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "lib", "fill", "--profile", "smoke", *options],
        cwd=book.root,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ids_of(text):
    """The ids that start a line, in their order."""
    words = [line.split()[0] for line in text.splitlines() if line.strip()]
    return [word for word in words if len(word) == 16]


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def test_killed_twice_and_nothing_is_lost_or_doubled(book):
    # the runs of the page: all take as long, so its first arm comes first
    runs_of_page = [TINY.but(seed=s, train=TrainSpec(epochs=12.0, batch=16)) for s in (0, 1, 2)]
    order = [spec.id for spec in runs_of_page]
    cache, filed = Store(book.root / "data" / "results", book.root / "cache"), []
    for run, kill in zip(order, (signal.SIGKILL, signal.SIGTERM), strict=False):
        child = fill_command(book, "--budget", "1h")
        wait_for(cache.checkpoint(run).is_file)
        child.send_signal(kill)
        said, error = child.communicate(timeout=60)
        assert child.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 130}[kill], error
        filed += ids_of(said)
        assert cache.find(run) is None or run in filed
    written = {run: cache.find(run).stat().st_mtime_ns for run in filed}
    child = fill_command(book, "--budget", "1h")
    said, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert filed + ids_of(said) == order  # each of them once
    assert {run: cache.find(run).stat().st_mtime_ns for run in filed} == written
    for run in order:  # as if nobody had killed anything
        record = cache.peek(run)
        whole = Store(book.root / "p", book.root / "q")
        [unbroken] = runs.collect({"a": [record.spec]}, where=whole)["a"]
        assert record.result() == unbroken.result()
        assert 0 < record.timing["train_seconds"] < record.timing["run_seconds"]


def test_the_end_of_the_budget_leaves_a_checkpoint(book):
    book.profile("smoke", "a/one: {width: 100000, layers: [0]}\n")  # hours
    file = book.root / "lib" / "runs" / "estimate.py"
    file.write_text(file.read_text() + "\nDEFAULT_RATE = dict.fromkeys(DEFAULT_RATE, 1e20)\n")
    checkpoints = []
    for budget in ("20s", "40s", "80s", "160s"):  # a slow machine begins late
        child = fill_command(book, "--budget", budget)
        said, error = child.communicate(timeout=300)
        assert child.returncode == 0, error
        checkpoints += (book.root / "cache" / "checkpoints").glob("*.pt")
        if checkpoints:
            break
    count = "0 runs filed, 0 failed, 1 interrupted (to go on from the checkpoint)"
    assert said.startswith(count)
    [checkpoint] = checkpoints
    assert Checkpoint(checkpoint).read()["step"] > 0
    assert not list((book.root / "cache").rglob("*.json"))


def test_dry_says_what_will_still_be_missing(book):
    dry, error = fill_command(book, "--budget", "0", "--dry").communicate(timeout=120)
    assert "nothing that is missing ends within the budget" in dry, error
    assert "complete then: 0 of 3 others" in dry and "  a/one: 3 runs, " in dry
    assert "3 longer than the whole budget" in dry
    assert not (book.root / "cache" / "records").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "soon"], "budget 'soon' is no time"),
        (["--workers", "0"], "--workers 0: at least one run"),
        (["--pages", "a/two"], "a/two has no runs under the profile smoke"),
    ],
)
def test_bad_input_is_refused(book, options, says):
    child = fill_command(book, *options)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 2 and says in error
