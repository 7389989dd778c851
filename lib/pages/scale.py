"""What pages ask of a machine under a profile, as text: for a plan, and as a page of the book.

The numbers are those of `lib.runs.demand`. Nothing is computed, opened or downloaded here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..verdicts import count
from . import profiles

if TYPE_CHECKING:  # the build imports this module, and does without torch
    from ..runs.demand import Demand, Total
    from ..runs.estimate import Estimate, Estimates
    from ..spec import RunSpec

GIB, GB = 2**30, 1e9
RULE = (
    "Multiply-adds: three forward passes for a training image (one, and two that stand for the "
    "backward pass), one for an image of each validation (before the first epoch and after each) "
    "and of the test; nothing is taken off for what is pruned or extracted. Images are those of "
    "training, each time that one is seen."
)


# ---- the plan of some pages


@dataclass(frozen=True)
class Priced:
    """Holds pages with what each asks for, and their sum, in which each run counts once.

    pace: a sentence that says what the hours rest on.
    """

    profile: str
    runs: Mapping[str, RunSpec]
    demands: Mapping[str, Demand]
    pages: Mapping[str, Total]
    total: Total
    pace: str


def runs_of(keys: Sequence[str], profile: str, **given: object) -> dict[str, list[RunSpec]]:
    """Plans pages, and returns the runs of each; those without the profile are left out.

    given: parameters of the page, where it is one.
    """
    return {
        key: [run for runs in profiles.plan(key, profile, **given).values() for run in runs]
        for key in keys
        if profiles.has_profile(key, profile)
    }


def priced(
    pages: Mapping[str, Sequence[RunSpec]],
    profile: str,
    rate: float | None = None,
    left: Mapping[str, Estimate | None] | None = None,
) -> Priced:
    """Prices the runs of some pages, as `runs_of` returns them.

    rate: multiply-adds a second of a card or, for runs on the CPU, of a thread, above 0; None =
    hours are those that `fill` expects here. left: the runs of a plan, parents among them, with
    what each still takes (None = not estimated yet); no others count. Raises ValueError for a rate
    of 0 or below.
    """
    from ..runs import demand

    if rate is not None and not rate > 0:
        raise ValueError(f"--rate {rate}: give multiply-adds a second above 0, such as 2e13")
    asked = {run.id: run for runs in pages.values() for run in runs}
    runs = demand.with_parents(asked.values())
    if left is not None:
        runs = {run: spec for run, spec in runs.items() if run in left}
    known = functools.cache(_known)
    demands = demand.demands_of(runs, _sizes(known))
    if rate is None:
        left = left or {}
        expected = {run: left.get(run) or known().of(runs[run]) for run in demands}
        seconds = {run: estimate.seconds for run, estimate in expected.items()}
        pace = _pace(expected.values())
    else:
        seconds = {run: demand.seconds_at(rate, runs[run], demands[run]) for run in demands}
        pace = f"Hours: at {rate:.2g} multiply-adds a second of a card, or of a thread."

    def total(specs: Iterable[RunSpec]) -> Total:
        # in their order: sums are then the same
        wanted = dict.fromkeys(spec.id for spec in specs if spec.id in runs)
        family = demand.with_parents(runs[run] for run in wanted)
        family = {run: runs[run] for run in family if run in runs}
        of_family = {run: demands[run] for run in family if run in demands}
        return demand.total_of(wanted, family, of_family, seconds)

    totals = {key: total(specs) for key, specs in pages.items()}
    return Priced(profile, runs, demands, totals, total(asked.values()), pace)


def _known() -> Estimates:
    """Reads what records say of times and sizes, most of which the index remembers."""
    from ..runs.estimate import Estimates
    from ..runs.store import store

    estimates = Estimates.of_store(store())
    store().index.save()
    return estimates


def _pace(expected: Iterable[Estimate]) -> str:
    """Says what expected seconds rest on."""
    from ..runs.estimate import BY_DEFAULT, DEFAULT_RATE

    by_default = [estimate.basis.startswith(BY_DEFAULT) for estimate in expected]
    said = f"Hours: as `fill` expects them, of {count(len(by_default), 'run')} "
    said += f"{by_default.count(False):,} by records of this processor or card"
    if any(by_default):
        said += (
            f", the others at an assumed rate, {DEFAULT_RATE['cpu']:.2g} multiply-adds a second of "
            f"a thread, {DEFAULT_RATE['cuda']:.2g} of a card (--rate gives another)"
        )
    return f"{said}."


def _sizes(known: Callable[[], Estimates]):
    """Returns what gives the images of a run: published sizes, else those of records."""
    from ..runs import demand

    def sizes(spec: RunSpec):
        if (images := demand.published_sizes(spec)) is not None:
            return images
        return known().images(spec), "records"

    return sizes


HEAD = ("page", "runs", "parents", "epochs", "images", "multiply-adds", "memory", "hours", "disk")


def cells(total: Total) -> list[str]:
    """Writes a total: runs, parents, epochs, images, multiply-adds, GiB, hours, GB."""
    if not total.runs:
        return ["none", *["-"] * (len(HEAD) - 2)]
    hours = ", ".join(f"{value:,.1f} {device}" for device, value in total.hours.items())
    return [
        f"{total.runs:,}",
        f"{total.parents:,}",
        f"{total.epochs:,.0f}",
        f"{total.trained / 1e6:,.2f} M",
        f"{total.macs:.2e}",
        f"{total.memory / GIB:,.1f} GiB",
        hours,
        f"{total.disk / GB:,.2f} GB",
    ]


def listing(plan: Priced) -> str:
    """Writes the plan of some pages for a console: tables, rule, readings."""
    rows = [list(HEAD), *([key, *cells(total)] for key, total in plan.pages.items())]
    if len(plan.pages) > 1:
        rows.append(["all, each run once", *cells(plan.total)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            RULE,
            "Parents are further runs that these start from. Memory is that of the largest run.",
            plan.pace,
            *_sources(plan),
            *readings(plan),
        ]
    )


def _sources(plan: Priced) -> list[str]:
    """Says where the numbers of images come from, by data set."""
    from ..inputs.published import DATA_SETS

    bases = {}
    for run, demand in plan.demands.items():
        bases.setdefault(demand.basis, set()).add(plan.runs[run].data.name)
    lines = []
    for name in sorted(bases.get("published", ())):
        data_set = DATA_SETS[name]
        stored = [data_set.train, data_set.val, data_set.test]
        count = ", ".join("none" if size is None else f"{size:,}" for size in stored)
        lines.append(f"{name}: published as {count} (train, val, test; {data_set.source})")
    for name in sorted(bases.get("records", ())):
        lines.append(f"{name}: as many images as its records say; without any, CIFAR-100's")
    return lines


def readings(plan: Priced) -> list[str]:
    """Lists the readings that the profile takes for the studies of the pages."""
    lines = []
    for study in dict.fromkeys(key.split("/")[0] for key in plan.pages):
        sentences = profiles.readings(study, plan.profile)
        lines += [f"Readings, {study}:", *(f"- {s}" for s in sentences)] if sentences else []
    return lines


# ---- what is missing here


def here(runs: Iterable[RunSpec], check: bool = True) -> list[str]:
    """Lists what this machine lacks for some runs, and what would be refused before any work.

    check: False leaves the latter out, which builds every architecture.
    """
    import torch

    from ..inputs import at_hand
    from ..runs import demand

    runs = list(runs)
    data = {spec.data.name for spec in runs}
    weights = {(spec.backbone.weights or "", spec.backbone.name) for spec in runs if not spec.init}
    absent = [at_hand.missing_data(name) for name in sorted(data)]
    absent += [at_hand.missing_weights(name or None, model) for name, model in sorted(weights)]
    lines = [str(one) for one in absent if one is not None]
    on_card = sum(spec.device == "cuda" for spec in runs)
    if on_card and not torch.cuda.is_available():
        lines.append(
            f"graphics card: not here, for {count(on_card, 'run')} with device='cuda'. To get "
            "one: a machine that has it, or `-p device cpu` for runs of their own"
        )
    refused = demand.failing(runs) if check else {}
    lines += [
        f"refused before any work, {count(runs_of_it, 'run')}: {said}"
        for said, runs_of_it in refused.items()
    ]
    return ["Missing on this machine:", *(f"- {line}" for line in lines or ["nothing"])]
