"""What is missing of the pages' runs, in the order in which it decides most an hour.

    plan = missing({"vimoe/routing": grid}, where, estimates, card)  # what, for what, for how long
    plan.schedule(7200, workers=2)  # what would be started within two hours

A *purpose* is a claim of the ledger, or an arm (a name of a page's grid) on which no claim is
judged. It is served once the runs of all its planned seeds are there, so purposes come in the order
of how many are served an hour (`value`); an open claim is worth far more than a settled one or an
arm, and one whose verdict stands while seeds are still to come lies between. An arm has its row
from its first record on, so a page gets one seed of each such arm before further ones. Runs that
others start from come first, and count as what their children cost, where the cache lacks their
weights.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..spec import RunSpec
from . import collect, locks
from .collect import Grid
from .estimate import Estimate, Estimates
from .store import Store

# Worths; other: a claim that is settled, the first seed of an arm without claim.
OPEN_CLAIM, OTHER, FURTHER_SEEDS = 1.0, 0.01, 0.001
# A claim that its pilot has decided. Were it worth no more than a settled one, further seeds would
# go to undecided claims alone: that is to stop once a verdict has come, and lets more false claims
# hold. It is worth less than an open one, as most verdicts stay.
DECIDED_PILOT = 0.1


@dataclass(frozen=True)
class Purpose:
    """Holds a claim or an arm of a page, and what it lacks: ids of runs, parents before children.

    worth: OPEN_CLAIM for a claim that nothing has decided yet, DECIDED_PILOT for one that seeds
    still to come may change, FURTHER_SEEDS for an arm that has a record or gets its first one by
    another purpose, else OTHER. first_seed: whether it is that other purpose of an arm, which has
    the name of the arm as well.
    """

    page: str
    name: str
    missing: tuple[str, ...]
    worth: float = OPEN_CLAIM
    first_seed: bool = False

    def __str__(self) -> str:
        return f"{self.page}: {self.name}{', first seed' if self.first_seed else ''}"


@dataclass(frozen=True)
class Item:
    """Holds a run that is missing, what it takes, the purposes that it serves, and the missing
    runs that it starts from, by id."""

    spec: RunSpec
    estimate: Estimate
    serves: tuple[Purpose, ...]
    needs: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """Holds what is missing, in its order.

    without_card: purposes that lack runs for a graphics card, on a machine that has none.
    elsewhere: ids of runs that other processes compute now.
    """

    items: tuple[Item, ...]
    purposes: tuple[Purpose, ...]
    without_card: tuple[Purpose, ...] = ()
    elsewhere: tuple[str, ...] = ()

    def schedule(self, budget: float, workers: int = 1) -> list[Item]:
        """Lists what is started within `budget` seconds, in its order, if estimates are right.

        Either all of them end in time, or none does: see `resumable`.
        """
        waiting, done, started = list(self.items), set(), []
        running: list[tuple[float, int]] = []  # (end, place in started)
        now, one_ends = 0.0, False

        def ready(item: Item) -> bool:
            return item.needs <= done

        while True:
            while len(running) < workers:
                item = startable(waiting, budget - now, ready)
                if item is not None:
                    one_ends = True
                elif not one_ends:
                    item = resumable(waiting, budget - now, ready)
                if item is None:
                    break
                waiting.remove(item)
                heapq.heappush(running, (now + item.estimate.seconds, len(started)))
                started.append(item)
            if not running:
                return started
            now, place = heapq.heappop(running)
            done.add(started[place].spec.id)

    def served_after(self, done: Collection[str]) -> list[Purpose]:
        """Lists the purposes that lack nothing once the runs of these ids are there."""
        return [purpose for purpose in self.purposes if set(purpose.missing) <= set(done)]


def startable(
    waiting: Sequence[Item], seconds_left: float, ready: Callable[[Item], bool]
) -> Item | None:
    """Returns the first run that is expected to end in time and has what it starts from."""
    for item in waiting:
        if item.estimate.seconds <= seconds_left and ready(item):
            return item
    return None


def resumable(
    waiting: Sequence[Item], seconds_left: float, ready: Callable[[Item], bool]
) -> Item | None:
    """Returns the first run that trains, so that the end of the budget leaves a checkpoint, and has
    what it starts from; None where no time is left.

    It is for budgets in which no run ends, which would never come to anything else.
    """
    if seconds_left <= 0:
        return None
    return startable(waiting, math.inf, lambda item: item.spec.train is not None and ready(item))


def value(served: Sequence[Purpose]) -> float:
    """Says what it is worth that these purposes are served: the sum of their worths."""
    return sum(purpose.worth for purpose in served)


def missing(
    plans: Mapping[str, Grid],
    where: Store,
    estimates: Estimates,
    card: bool,
    claims: Mapping[str, tuple[str, Sequence[str]]] | None = None,
    decided: Mapping[str, bool] | None = None,
) -> Plan:
    """Plans what the store lacks of the grids of some pages.

    plans: {page: its grid}, in the order that decides between equals. card: whether this machine
    has a graphics card. claims: {id: (page whose grid has its runs, names of its arms)}. decided:
    of those whose verdict stands, {id: whether it is settled, so that further runs only narrow it}.
    A failed run counts as missing.

    Without a card, the seeds that a claim lacks of runs for a card are planned on the CPU: both
    sides of a seed must share a device, and not all seeds. Not so where an arm is one model for all
    seeds, which is not on the CPU.
    """
    claims, decided = claims or {}, decided or {}
    if not card:
        plans = {page: _on_this_machine(grid, page, claims, where) for page, grid in plans.items()}
    wanted = collect.unique(s for grid in plans.values() for specs in grid.values() for s in specs)
    state = {spec.id: collect.status_of(spec, where) for spec in wanted}
    chains = {spec.id: _chain(spec, where) for spec in wanted if state[spec.id] != "done"}
    # as planned first: a page's own spec says where a record is filed
    planned = [spec for spec in wanted if spec.id in chains]
    specs = {s.id: s for s in collect.unique([*planned, *(s for c in chains.values() for s in c)])}
    elsewhere = [run for run in specs if locks.is_held(where.lock(run))]
    purposes, without_card = [], []
    for page, name, worth, runs, first_seed in _purposes(plans, claims, decided, chains):
        chained = [s.id for spec in runs if spec.id in chains for s in chains[spec.id]]
        lacks = tuple(run for run in dict.fromkeys(chained) if run not in elsewhere)
        needs_card = not card and any(specs[run].device == "cuda" for run in lacks)
        if lacks:
            listed = without_card if needs_card else purposes
            listed.append(Purpose(page, name, lacks, worth, first_seed))
    cost = {
        run: _remaining(specs[run], estimates, where)
        for run in dict.fromkeys(run for purpose in purposes for run in purpose.missing)
    }
    order = in_order(purposes, {run: estimate.seconds for run, estimate in cost.items()})
    items = []
    for run in order:
        serves = tuple(purpose for purpose in purposes if run in purpose.missing)
        needs = frozenset(s.id for s in _chain(specs[run], where)) - {run}
        items.append(Item(specs[run], cost[run], serves, needs))
    return Plan(tuple(items), tuple(purposes), tuple(without_card), tuple(elsewhere))


def _on_this_machine(
    grid: Grid, page: str, claims: Mapping[str, tuple[str, Sequence[str]]], where: Store
) -> Grid:
    """Returns a grid with runs on the CPU in the place of those for a card that claims lack."""
    seeded = {
        arm
        for its_page, arms in claims.values()
        if its_page == page and all(len(grid.get(arm, [])) > 1 for arm in arms)
        for arm in arms
    }
    return {
        arm: [
            run.on("cpu") if arm in seeded and collect.status_of(run, where) != "done" else run
            for run in runs
        ]
        for arm, runs in grid.items()
    }


def _purposes(
    plans: Mapping[str, Grid],
    claims: Mapping[str, tuple[str, Sequence[str]]],
    decided: Mapping[str, bool],
    lacking: Collection[str],
) -> Iterator[tuple[str, str, float, Sequence[RunSpec], bool]]:
    """Yields page, name, worth and runs of each claim, then of each arm that no claim names; last,
    whether it is an arm's first seed alone.

    lacking: ids of runs without record. An arm of several seeds that has none yet comes twice: its
    first seed, and all of them.
    """
    named = set()
    for claim, (page, arms) in claims.items():
        if page in plans:
            named |= {(page, arm) for arm in arms}
            runs = [spec for arm in arms for spec in plans[page].get(arm, [])]
            worth = OPEN_CLAIM
            if claim in decided:
                worth = OTHER if decided[claim] else DECIDED_PILOT
            yield page, f"claim {claim}", worth, runs, False
    for page, grid in plans.items():
        for arm, runs in grid.items():
            if (page, arm) in named:
                continue
            if len(runs) == 1:
                yield page, arm, OTHER, runs, False
            else:
                if all(spec.id in lacking for spec in runs):
                    yield page, arm, OTHER, runs[:1], True
                yield page, arm, FURTHER_SEEDS, runs, False


def in_order(purposes: Sequence[Purpose], seconds: Mapping[str, float]) -> list[str]:
    """Orders runs so that the purposes that are served at most value an hour come first; of
    equals, the first.

    seconds: what each run takes. A run that several lack is paid for once, by the first.
    """
    purposes_of_run: dict[str, list[Purpose]] = defaultdict(list)
    for purpose in purposes:
        for run in purpose.missing:
            purposes_of_run[run].append(purpose)

    def an_hour(purpose: Purpose, placed: Mapping[str, None]) -> float:
        new = [run for run in purpose.missing if run not in placed]
        together = placed.keys() | set(new)
        # only one that lacks one of the new runs can be served by them
        touched = dict.fromkeys(other for run in new for other in purposes_of_run[run])
        served = [other for other in touched if together.issuperset(other.missing)]
        return value(served) / max(sum(seconds[run] for run in new), 1e-9)

    placed: dict[str, None] = {}
    remaining = list(purposes)
    while remaining:
        worth = [an_hour(purpose, placed) for purpose in remaining]
        placed |= dict.fromkeys(remaining[worth.index(max(worth))].missing)
        remaining = [p for p in remaining if not placed.keys() >= set(p.missing)]
    return list(placed)


def _chain(spec: RunSpec, where: Store) -> list[RunSpec]:
    """Lists a run after those that it starts from and which are not there."""
    chain = []
    for needed in spec.needed_runs:
        if not where.can_be_started_from(needed.id):
            chain += _chain(needed.but(keep=True), where)
    return [*collect.unique(chain), spec]


def _remaining(spec: RunSpec, estimates: Estimates, where: Store) -> Estimate:
    """Estimates what is left of a run: all, or what its checkpoint has not done."""
    estimate = estimates.of(spec)
    checkpoint = where.checkpoint(spec.id)
    if spec.train is None or not checkpoint.is_file():
        return estimate
    from ..training.checkpoint import Checkpoint

    images, _, _ = estimates.images(spec)
    steps = spec.train.epochs * images / spec.train.batch
    share = min(1.0, max(0.0, 1 - Checkpoint(checkpoint).step() / steps))
    return Estimate(share * estimate.seconds, f"{estimate.basis}, from its checkpoint")
