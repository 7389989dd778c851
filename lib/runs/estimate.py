"""What a run will take, in seconds of wall time, from the records of runs of its kind.

A record is as near to a run as the first of its `kinds` that both share: another seed of the
same run, the same model under another budget, the same backbone, and in the end anything that the
same processor multiplied in the same type. The further away, the more is scaled: by the passes of
images through the model, and by its multiply-adds. Records of other processors say nothing.
"""

from __future__ import annotations

import bisect
import datetime
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..spec import RunSpec
from ..spec.base import Spec
from .environment import environment
from .index import Facts, digest_of
from .model_size import model_size
from .store import Store

BACKWARD = 2  # passes that a backward pass counts for: gradients of inputs and of weights
# Where no record of this processor helps: multiply-adds a second, and what a process takes to
# start. Of a thread: a ViT-S at 56 px reached 2e10 in float32 and 5e10 in bfloat16. Of a card: a
# ViT-S at 224 px trains 1,600 to 2,300 images a second on an H100 in bfloat16 without compilation
# (benchmarks of nvSubquadratic, ViT-5-Small, batch 256), which at 4.6e9 multiply-adds an image and
# three passes is 2.2e13 to 3.2e13: a twentieth of its data sheet. Small images and batches stay
# below it (at 56 px an H200 reached 4e12).
DEFAULT_RATE = {"cpu": 2.5e10, "cuda": 2e13}
BY_DEFAULT = "a default rate"  # the basis of what only that says
START_SECONDS = 5.0
# A pruned model is never faster than this share of the whole one's time, by the default rate: small
# products run below it (seen: a ViT-S at 56 px cut by 95% takes 0.37 of the time).
LEAST_LEFT = 0.4
# images of training, validation and test where neither spec nor records say it: CIFAR-100's
DEFAULT_SIZES = (45_000, 5_000, 10_000)
# A record without `run_seconds` is followed by the next one of its machine. A gap longer than this,
# in seconds and in multiples of what the record measured, is a pause.
LONGEST_GAP = (60.0, 8.0)
# entries of a record without which it says nothing here
NEEDED = {"created", "environment", "timing", "cost", "test", "val", "history"}


@dataclass(frozen=True)
class Estimate:
    """Holds expected seconds of wall time, and what they are taken from."""

    seconds: float
    basis: str


class Estimates:
    """Estimates runs from what records say: rows of `row_of`, by run."""

    def __init__(self, rows: Mapping[str, Mapping[str, Any]]):
        self._sizes = _sizes(rows)
        self.seconds = whole_seconds(rows)
        self._rates: dict[Hashable, list[float]] = defaultdict(list)  # seconds for a unit of work
        for run, row in rows.items():
            images = _images(row["images"], self._sizes.get(row["split"]))
            seen = _passes(row["epochs"], images)
            for level, kind in enumerate(row["kinds"]):
                work = _work(level, row["shrunk"], seen, lambda row=row: row["macs"])
                self._rates[tuple(row["machine"]), level, kind].append(self.seconds[run] / work)

    @classmethod
    def of_store(cls, where: Store) -> Estimates:
        """Estimates from all records of a store, most of which the index knows."""
        return cls({run: facts["row"] for run, facts in where.facts() if facts["row"]})

    def of(self, spec: RunSpec) -> Estimate:
        """Estimates a run on this machine."""
        machine = _machine(_environment(spec.dtype, spec.device), spec)
        try:
            return self._nearest(spec, machine)
        except ValueError:  # its model cannot be built: the run will fail at once and say why
            return Estimate(START_SECONDS, "no such model")

    def _nearest(self, spec: RunSpec, machine: Hashable) -> Estimate:
        """Estimates from the nearest kind that has records, else from a default rate."""
        for level, kind in enumerate(map(digest_of, kinds(spec))):
            rates = self._rates.get((machine, level, kind))
            if rates:
                work = _work(level, _shrunk(spec), self.passes(spec), lambda: model_size(spec).macs)
                seconds = statistics.median(rates) * work
                return Estimate(seconds, f"{len(rates)} x {KINDS[level]}")
        rate = DEFAULT_RATE[spec.device] * (spec.threads if spec.device == "cpu" else 1)
        work = self.passes(spec) * model_size(spec).macs
        work *= max(_left_by_pruning(spec), LEAST_LEFT)
        return Estimate(START_SECONDS + work / rate, BY_DEFAULT)

    def passes(self, spec: RunSpec) -> float:
        """Counts the forward passes of single images that training and evaluation are worth."""
        return passes(spec, self.images(spec))

    def images(self, spec: RunSpec) -> tuple[int, int, int]:
        """Returns the numbers of images of training, validation and test."""
        return _images(_asked(spec), self._sizes.get(_split(spec)))


def _images(asked: Sequence[int | None], known: Sequence[int] | None) -> tuple[int, int, int]:
    """Returns the images of each split: those that are asked for, else known, else the defaults."""
    known = DEFAULT_SIZES if known is None else known
    return tuple(k if own is None else own for own, k in zip(asked, known, strict=True))


def _work(level: int, shrunk: bool, seen: float, macs: Callable[[], float]) -> float:
    """Computes what seconds are proportional to within a kind. seen: passes; macs: of an image."""
    if level == 0:
        return 1.0
    # What is left after pruning or extraction only data decide, so nothing is scaled by it.
    return seen if level == 1 or shrunk else seen * macs()


def passes(spec: RunSpec, images: tuple[int, int, int]) -> float:
    """Counts the forward passes of single images that a run is worth.

    A training image counts 1 + BACKWARD in each epoch, a validation image 1 before the first epoch
    and 1 after each, a test image 1. images: of training, validation and test.
    """
    return _passes(None if spec.train is None else spec.train.epochs, images)


def _passes(epochs: float | None, images: tuple[int, int, int]) -> float:
    train, val, test = images
    if epochs is None:
        return test
    return (1 + BACKWARD) * epochs * train + (1 + math.ceil(epochs)) * val + test


# ---- kinds of runs, from near to far

KINDS = (
    "another seed",
    "the same model",
    "the same methods",
    "the same backbone",
    "this processor",
)


def kinds(spec: RunSpec) -> tuple[Hashable, ...]:
    """Names the kinds that a run belongs to, one for each of KINDS."""
    train = spec.train
    goal = None if train is None else (train.trainable, train.mask is not None)
    recipe = None
    if train is not None:
        recipe = (train.batch, train.distil, train.has_teacher, train.ema is not None)
    probes = (spec.experts_off, spec.depth_probe, spec.cam_probe, spec.resident)
    router = None if spec.moe is None else spec.moe.router
    processor = (goal is None, _shrunk(spec), spec.dtype, spec.device, spec.threads)
    whole_backbone = spec.backbone.but(drop_path=0.0, weights=None, grid=None)
    steps = tuple(name for name, _ in spec.steps)
    backbone = (*processor, whole_backbone, spec.data.image_size, goal, router, steps)
    methods = (*backbone, recipe, probes, *(_words(rules) for _, rules in spec.steps))
    model = (*methods, spec.moe, *(rules for _, rules in spec.steps))
    return without_seeds(spec).id, model, methods, backbone, processor


def _shrunk(spec: RunSpec) -> bool:
    """Says whether the model is smaller than its backbone and its MoE layers say."""
    return spec.narrowed or spec.extracted or spec.reduced


def _left_by_pruning(spec: RunSpec) -> float:
    """Returns what the pruning of a run and of those that it starts from leaves of a layer."""
    before = 1.0 if spec.init is None else _left_by_pruning(spec.init)
    structured = spec.prune is not None and spec.prune.structured
    return before * (1 - spec.prune.share) if structured else before


def _words(rules: Spec) -> tuple[str, ...]:
    """Lists the words in the rules of a step, the names of its methods."""
    words = []
    for name in type(rules).model_fields:
        value = getattr(rules, name)
        if isinstance(value, Spec):
            words += _words(value)
        elif isinstance(value, str):
            words.append(value)
    return tuple(words)


def without_seeds(spec: RunSpec) -> RunSpec:
    """Returns a run, and those that it starts from, with seed 0."""
    init = None if spec.init is None else without_seeds(spec.init)
    return spec.but(seed=0, init=init)


def _machine(place: Mapping[str, Any], spec: RunSpec) -> tuple[str, str]:
    """Names what computes: the card or the processor, and how it multiplies (two processors of one
    name may differ in that). place: the `environment` of a record."""
    chip = place.get("accelerator") or place["processor"]
    return chip, place.get("products", spec.dtype)


# ---- what records say


def facts_of(content: Mapping[str, Any], spec: RunSpec | None) -> Facts:
    """Returns what the index remembers of a verified record: status, data seen, row of estimates.

    The row is None where a record says nothing to estimates.
    """
    data = content.get("data")
    says = spec is not None and content["status"] == "ok" and content.keys() >= NEEDED
    return {
        "status": content["status"],
        "data": None if data is None else digest_of(data),
        "row": row_of(spec, content) if says else None,
    }


def row_of(spec: RunSpec, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what estimates take from a finished record, as plain values that JSON holds."""
    timing, place = content["timing"], content["environment"]
    learnt = spec.train is not None and spec.data.train is None
    images = timing["train_images_per_s"] * timing["train_seconds"] if learnt else None
    measured = content["test"]["n"] + len(content["history"]) * content["val"].get("n", 0)
    return {
        "kinds": [digest_of(kind) for kind in kinds(spec)],
        "machine": list(_machine(place, spec)),
        "clock": digest_of([place["processor"], place.get("accelerator")]),
        "created": datetime.datetime.fromisoformat(content["created"]).timestamp(),
        "measured": timing.get("train_seconds", 0.0) + measured / timing["eval_images_per_s"],
        "run_seconds": timing.get("run_seconds"),
        "shrunk": _shrunk(spec),
        "macs": content["cost"]["macs"],
        "epochs": None if spec.train is None else spec.train.epochs,
        "images": list(_asked(spec)),
        "split": _split(spec),
        # of splits that are taken whole, what the record counted
        "counted": [
            None if images is None else round(images / spec.train.epochs),
            content["val"]["n"] if spec.data.val is None and content["val"] else None,
            content["test"]["n"] if spec.data.test is None else None,
        ],
    }


def whole_seconds(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the wall seconds of finished runs, by id. rows: of `row_of`.

    A record without `run_seconds` knows its training and its evaluation alone. The rest (steps,
    probes, data) is taken from when the next run on that machine started, as long as no pause is in
    between; with several runs at a time that is a lower bound, too.
    """
    starts = defaultdict(list)
    for row in rows.values():
        starts[row["clock"]].append(row["created"])
    for times in starts.values():
        times.sort()
    return {run: _seconds(row, starts[row["clock"]]) for run, row in rows.items()}


def _seconds(row: Mapping[str, Any], starts: Sequence[float]) -> float:
    """Returns the seconds of one run. starts: of all runs of its machine, sorted."""
    if row["run_seconds"] is not None:
        return row["run_seconds"]
    measured = row["measured"]
    first = bisect.bisect_left(starts, row["created"] + measured)
    gap = starts[first] - row["created"] if first < len(starts) else math.inf
    pause = max(LONGEST_GAP[0], LONGEST_GAP[1] * measured)
    return gap if gap <= pause else measured


def _asked(spec: RunSpec) -> tuple[int | None, int | None, int | None]:
    return spec.data.train, spec.data.val, spec.data.test


def _split(spec: RunSpec) -> str:
    return digest_of([spec.data.name, spec.data.label, spec.data.classes])


def _sizes(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, int, int]]:
    """Returns the images of training, validation and test of each data set, as far as records that
    used them all say it; else the defaults."""
    sizes: dict[str, list[int]] = defaultdict(lambda: list(DEFAULT_SIZES))
    for row in rows.values():
        size = sizes[row["split"]]
        for at, counted in enumerate(row["counted"]):
            size[at] = size[at] if counted is None else counted
    return {split: tuple(size) for split, size in sizes.items()}


@functools.cache
def _environment(dtype: str, device: str) -> dict[str, Any]:
    """Describes this machine once: its versions take a while to look up."""
    return environment(RunSpec(dtype=dtype, device=device))
