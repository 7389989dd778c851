"""What the pages lack, in the order in which `python -m lib fill` computes it, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from ..verdicts import agree, count, ledger
from . import all_verdicts, profiles

if TYPE_CHECKING:  # the build imports this module, and does without torch
    from ..runs.fill import Outcome
    from ..runs.order import Item, Plan, Purpose

FIRST = 5  # runs that the head of the list shows


def plan(profile: str, keys: Sequence[str], card: bool | None = None) -> Plan:
    """Plans what pages lack under a profile; the first page goes first among equals.

    Pages without that profile lack nothing. card: whether there is a graphics card; None = asks
    this machine.
    """
    import torch

    from ..runs.estimate import Estimates
    from ..runs.order import missing
    from ..runs.store import store

    grids = {key: profiles.plan(key, profile) for key in keys if profiles.has_profile(key, profile)}
    claims = {}
    if profile == profiles.PUBLISHED:  # no other profile's records are judged
        claims = {c.id: (key, c.arms) for key in grids for c in ledger.on_runs_of(key)}
    estimates = Estimates.of_store(store())
    card = torch.cuda.is_available() if card is None else card
    plan = missing(grids, store(), estimates, card, claims, all_verdicts.settled())
    store().index.save()
    return plan


def rows(items: Sequence[Item]) -> Iterator[str]:
    """Writes a line for each run: id, seed, minutes expected, their running total, what for."""
    yield f"{'run':16}  seed  minutes   total  serves"
    total = 0.0
    for item in items:
        minutes = item.estimate.seconds / 60
        total += minutes
        first, more = item.serves[0], len(item.serves) - 1
        others = f" and {more} more" if more else ""
        yield (
            f"{item.spec.id}  {item.spec.seed:4}  {minutes:7.1f} {total:7.1f}  {first}{others} "
            f"[{item.estimate.basis}]"
        )


def listing(plan: Plan, budget: float, workers: int) -> str:
    """Writes what would be run inside a budget of seconds, and what will still be missing then."""
    started = plan.schedule(budget, workers)
    done = {item.spec.id for item in started if item.estimate.seconds <= budget}
    lines = [*_assumed(plan), *rows(started), ""] if started else _assumed(plan)
    if not done:
        lines.append("nothing that is missing ends within the budget" + _begun(plan, started))
    return "\n".join([*lines, *_rest(plan, done, "then", budget)])


def _assumed(plan: Plan) -> list[str]:
    """Says that all claims count as open where no build has said which of them are decided."""
    from ..runs.order import OPEN_CLAIM

    try:
        all_verdicts.read()
    except FileNotFoundError as error:
        if any(purpose.worth == OPEN_CLAIM for purpose in plan.purposes):
            return [f"all claims count as open, since {error}"]
    return []


def _begun(plan: Plan, started: Sequence[Item]) -> str:
    """Ends the sentence on a budget in which no run ends: what is begun in it, if anything is."""
    if started:
        begun = f"{count(len(started), 'run')} {agree('are', len(started))} begun"
        return f": {begun} and interrupted, and the next start goes on from the checkpoint"
    return ", and no run is begun: give a longer --budget" if plan.items else ""


def price(plan: Plan, profile: str, keys: Sequence[str], rate: float | None) -> str:
    """Writes what the missing runs of pages ask for, those for an absent card as well, and what
    this machine lacks. rate: as in `scale.priced`; None = the times of the plan."""
    from . import scale

    purposes = (*plan.purposes, *plan.without_card)
    lacking = {run for purpose in purposes for run in purpose.missing}
    pages = scale.runs_of(keys, profile)
    pages = {
        # without a card, seeds that a claim lacks are planned on the CPU
        page: [run for spec in runs for run in (spec, spec.on("cpu")) if run.id in lacking]
        for page, runs in pages.items()
    }
    left = dict.fromkeys(lacking) | {item.spec.id: item.estimate for item in plan.items}
    priced = scale.priced(pages, profile, rate, left)
    return "\n".join(["", scale.listing(priced), *scale.here(priced.runs.values(), check=False)])


def summary(plan: Plan, outcome: Outcome) -> str:
    """Writes what a fill did, and what is still missing."""
    interrupted = len(outcome.interrupted)
    did = f"{count(len(outcome.filed), 'run')} filed, {len(outcome.failures)} failed"
    cut = f", {interrupted} interrupted (to go on from the checkpoint)" if interrupted else ""
    return "\n".join([did + cut, *_rest(plan, set(outcome.filed), "now")])


def _rest(
    plan: Plan, done: Collection[str], when: str, budget: float | None = None
) -> Iterator[str]:
    """Writes what is missing once some runs are there: their number and hours, page by page.

    budget: in seconds; says how many runs are longer than all of it.
    """
    served = plan.served_after(done)
    left = [item for item in plan.items if item.spec.id not in done]
    lacking = _counted(served, plan.purposes)
    yield f"complete {when}: {lacking} that lack runs" if lacking else "nothing is missing"
    if left:
        yield f"still missing {when}: {count(len(left), 'run')}, {_hours(left)}"
    for page in dict.fromkeys(item.serves[0].page for item in left):
        of_page = [item for item in left if item.serves[0].page == page]
        too_long = sum(budget is not None and item.estimate.seconds > budget for item in of_page)
        note = f", {too_long} longer than the whole budget" if too_long else ""
        yield f"  {page}: {count(len(of_page), 'run')}, {_hours(of_page)}{note}"
    if plan.elsewhere:
        yield f"computed by other processes now: {count(len(plan.elsewhere), 'run')}"
    left_out = {(purpose.page, purpose.name): None for purpose in plan.without_card}
    for page, purposes in Counter(page for page, _ in left_out).items():
        yield f"left out, as this machine has no card for device='cuda': {purposes} of {page}"


def _counted(served: Sequence[Purpose], purposes: Sequence[Purpose]) -> str:
    """Counts what is served of all: open claims, those that a pilot decides, and others (arms and
    claims that are settled)."""
    from ..runs.order import DECIDED_PILOT, OPEN_CLAIM

    unserved = {(p.page, p.name) for p in purposes if p not in served}
    claims = {OPEN_CLAIM: "open claims", DECIDED_PILOT: "claims with a pilot's verdict"}
    names = {kind: set() for kind in (*claims.values(), "others")}
    for p in purposes:  # an arm and its first seed are one
        names[claims.get(p.worth, "others")].add((p.page, p.name))
    counts = {kind: (len(of - unserved), len(of)) for kind, of in names.items() if of}
    return ", ".join(f"{n} of {total} {kind}" for kind, (n, total) in counts.items())


def head(profile: str, keys: Sequence[str]) -> list[str]:
    """Writes the first runs of the list, with the command that computes them; none if nothing is
    missing."""
    items = plan(profile, keys).items
    if not items:
        return []
    more = len(items) - FIRST
    tail = [f"  ... and {more} more"] if more > 0 else []
    command = f"python -m lib fill --profile {profile} --budget 1h"
    first = [f"  {line}" for line in rows(items[:FIRST])]
    return [f"Next, by claims decided an hour ({command}):", *first, *tail]


def _hours(items: Sequence[Item]) -> str:
    return f"{sum(item.estimate.seconds for item in items) / 3600:.1f} h"
