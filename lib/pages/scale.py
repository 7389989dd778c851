"""What pages ask of a machine under a profile, as text: for a plan, and as a page of the book.

The numbers are those of `lib.runs.demand`. Nothing is computed, opened or downloaded here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..verdicts import count
from . import profiles

if TYPE_CHECKING:  # the build imports this module, and does without torch
    from ..runs.demand import Demand, Total
    from ..spec import RunSpec

GIB, GB = 2**30, 1e9
# Multiply-adds a second that a card is assumed to reach in training where none was measured and
# none given. A ViT-S at 224 px trains 1,600 to 2,300 images a second on an H100 in bfloat16 without
# compilation (benchmarks of nvSubquadratic, ViT-5-Small, batch 256), which at 4.6e9 multiply-adds
# an image and three passes is 2.2e13 to 3.2e13: a twentieth of the card's data sheet.
ASSUMED_RATE = 2e13
RULE = (
    "Multiply-adds: three forward passes for a training image (one, and two that stand for the "
    "backward pass), one for an image of each validation (before the first epoch and after each) "
    "and of the test; nothing is taken off for what is pruned or extracted. Images are those of "
    "training, each time that one is seen."
)


@dataclass(frozen=True)
class Rates:
    """Holds multiply-adds a second by device and dtype, of a thread or a card, and their source."""

    values: Mapping[tuple[str, str], float]
    said: Sequence[str]


def rates(given: float | None = None) -> Rates:
    """Returns the throughput that hours rest on: given, measured by `make bench`, or assumed.

    given: multiply-adds a second of a card or, for runs on the CPU, of a thread.
    """
    from ..runs.estimate import DEFAULT_RATE

    dtypes = ("float32", "bfloat16")
    if given is not None and not given > 0:
        raise ValueError(f"--rate {given}: give multiply-adds a second above 0, such as 2e13")
    if given is not None:
        values = {(device, dtype): given for device in ("cpu", "cuda") for dtype in dtypes}
        return Rates(values, [f"{given:.2g} multiply-adds a second, as given with --rate"])
    values, said = {}, []
    assumed = {"cpu": (DEFAULT_RATE["cpu"], "thread"), "cuda": (ASSUMED_RATE, "card")}
    for device, (default, unit) in assumed.items():
        for dtype in dtypes:
            measured = _measured(device, dtype)
            values[device, dtype] = measured or default
            origin = "measured by make bench" if measured else "assumed, nothing was measured here"
            rate = f"{values[device, dtype]:.2g} multiply-adds a second and {unit}"
            said.append(f"{device}, {dtype}: {rate} ({origin})")
    return Rates(values, said)


def _measured(device: str, dtype: str) -> float | None:
    """Reads how many multiply-adds a second the dense model of `make bench` reached, a thread."""
    from ..runs.model_size import model_size
    from ..spec import BackboneSpec, DataSpec, RunSpec
    from ..verdicts import speed

    try:
        measurement = speed.read(speed.file_of("short", device))
    except (OSError, ValueError):
        return None
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    batch = 16
    rows = [
        row.other.median
        for row in measurement.of("models")
        if (row.dtype, row.against, row.shape) == (short, "whole model", f"batch {batch}, plain")
    ]
    if not rows:
        return None
    dense = RunSpec(
        data=DataSpec(image_size=224), backbone=BackboneSpec(name="vit_small_patch14_dinov2")
    )
    threads = measurement.about["machine"]["threads"] if device == "cpu" else 1
    return batch * model_size(dense).macs / (min(rows) / 1e3) / threads


# ---- the plan of some pages


@dataclass(frozen=True)
class Priced:
    """Holds pages with what each asks for, and their sum, in which each run counts once."""

    profile: str
    runs: Mapping[str, RunSpec]
    demands: Mapping[str, Demand]
    pages: Mapping[str, Total]
    total: Total
    rates: Rates


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
    pages: Mapping[str, Sequence[RunSpec]], profile: str, rate: float | None = None
) -> Priced:
    """Prices the runs of some pages, as `runs_of` returns them. rate: see `rates`."""
    from ..runs import demand

    asked = {run.id: run for runs in pages.values() for run in runs}
    runs = demand.with_parents(asked.values())
    demands, throughput = demand.demands_of(runs, _sizes()), rates(rate)

    def total(specs: Iterable[RunSpec]) -> Total:
        wanted = dict.fromkeys(spec.id for spec in specs)  # in their order: sums are then the same
        family = {run: runs[run] for run in demand.with_parents(runs[run] for run in wanted)}
        of_family = {run: demands[run] for run in family if run in demands}
        return demand.total_of(wanted, family, of_family, throughput.values)

    totals = {key: total(specs) for key, specs in pages.items()}
    return Priced(profile, runs, demands, totals, total(asked.values()), throughput)


def _sizes():
    """Returns what gives the images of a run: published sizes, else those of records."""
    from ..runs import demand, estimate
    from ..runs.store import store

    known = None

    def sizes(spec: RunSpec):
        nonlocal known
        if (images := demand.published_sizes(spec)) is not None:
            return images
        if known is None:
            known = estimate.Estimates.of_store(store())
        return known.images(spec), "records"

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
            f"Throughput: {'; '.join(said_of(plan))}.",
            *_sources(plan),
            *readings(plan),
        ]
    )


def said_of(plan: Priced) -> list[str]:
    """Lists what is said of the rates that the runs of a plan use."""
    used = {(spec.device, spec.dtype) for spec in plan.runs.values()}
    lines = plan.rates.said
    return [line for line in lines if tuple(line.split(":")[0].split(", ")) in used] or list(lines)


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
