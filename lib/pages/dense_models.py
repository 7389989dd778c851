"""The dense models that pages compare with or cut, and the mixtures whose experts they drop.

One backbone on one data set has several accuracies in the book: pages train it in their own ways.
A generated table sets these ways beside each other, all of it from plans, specs and records.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..spec import TITLES, RunSpec
from ..verdicts import ledger
from . import coverage, profiles

TABLE = "how_to_read.html#the-dense-models-of-this-book"  # where the table stands
# fields in which runs of one way of training may differ: what they report, and where they run
_ASIDE = ("seed", "study", "threads", "device", "keep", "publish", "resident", "image_loads")


@dataclass
class Way:
    """Holds a way of training a model: pages that have it, and its runs by seed."""

    spec: RunSpec
    pages: dict[str, None] = field(default_factory=dict)
    runs_of_seed: dict[int, list[RunSpec]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, str]:
        """Returns what two ways may differ in, by name."""
        data, last = self.spec.data, self.spec.train
        stages = [run for run in reversed(self.spec.lineage) if run.train]
        return {
            "model": _model(self.spec),
            "weights": f"from {self.spec.backbone.weights or 'random weights'}",
            "labels": f"labels `{data.label}`",
            "classes": " after ".join(dict.fromkeys(map(_classes, reversed(stages)))),
            "training images": f"{data.training_images} at {data.image_size} px",
            "augmentation": f"augmentation `{data.augment}`",
            "epochs": f"{' + '.join(map(_epochs, stages))} epochs",
            "learning rate": f"learning rate {last.lr:g}",
            "batch": f"batch {last.batch}",
            "weight decay": f"weight decay {last.weight_decay:g}",
            "layer decay": f"layer decay {last.layer_decay:g}",
            "number format": self.spec.dtype,
            "test images": f"{'all' if data.test is None else f'{data.test:,}'} test images",
        }

    @functools.cached_property
    def accuracy(self) -> str:
        """Returns test top-1 in percent over the seeds that have records; "" if none has."""
        from ..verdicts.stats import accuracy_interval, format_interval  # numpy

        records = [
            next(filter(None, map(coverage.record_of, runs)), None)
            for runs in self.runs_of_seed.values()
        ]
        return format_interval(accuracy_interval(records))


def _epochs(run: RunSpec) -> str:
    """Says how long a stage trains, and what, where that is not all weights by labels."""
    part = "" if run.train.trainable == "all" else f" ({run.train.trainable})"
    return f"{run.train.epochs:g}{' (reconstruction)' if run.train.mask else part}"


def _classes(run: RunSpec) -> str:
    """Says which classes a stage is of, by their numbers in the data set, which begin with 0."""
    if run.data.classes is None:
        return "all classes"
    first, past = run.data.classes
    return f"classes {first} to {past - 1}"


def _model(run: RunSpec) -> str:
    """Names the architecture of a run in a few words."""
    shape = run.backbone
    name = f"`{shape.name}`" + (f" of width {shape.width}" if shape.width else "")
    if run.moe is None:
        return f"dense {name}"
    members = f", an ensemble of {run.moe.members}" if run.moe.members > 1 else ""
    return f"{name}, E={run.moe.experts}, K={run.moe.top_k} in {run.moe.layers} blocks{members}"


def is_whole(run: RunSpec) -> bool:
    """Says whether a run trains a model, from which nothing was taken, by labels of a folder."""
    is_cut = run.reduced or run.extracted or run.narrowed or run.prune or run.channels
    by_labels = run.train is not None and run.train.mask is None
    return by_labels and run.data.in_folder and not is_cut


def is_dense(run: RunSpec) -> bool:
    """Says the same of a dense model."""
    return is_whole(run) and not any(past.moe for past in run.lineage)


def ways(keys: Sequence[str]) -> list[Way]:
    """Lists the ways of training that claims are judged on, or that other runs start from.

    By data set, and in the order of the book.
    """
    plans = {
        key: profiles.plan(key, profiles.PUBLISHED)
        for key in keys
        if profiles.has_profile(key, profiles.PUBLISHED)
    }
    listed: dict[str, Way] = {}
    for key, plan in plans.items():
        for run in _compared(key, plan):
            listed.setdefault(_text_of(run), Way(run))
    # pages that show such a model or start from it, though no claim needs it there
    for key, plan in plans.items():
        for run in (run for runs in plan.values() for run in runs if is_whole(run)):
            if way := listed.get(_text_of(run)):
                way.pages[key] = None
                way.runs_of_seed.setdefault(run.seed, []).append(run)
        parents = {
            past.id: past for runs in plan.values() for run in runs for past in run.lineage[1:]
        }
        for past in filter(is_whole, parents.values()):
            if way := listed.get(_text_of(past)):
                way.pages[key] = None
    by_data: dict[str, list[Way]] = {}
    for way in listed.values():
        by_data.setdefault(way.spec.data.name, []).append(way)
    return [way for same_data in by_data.values() for way in same_data]


def _compared(key: str, plan: dict[str, list[RunSpec]]) -> Iterator[RunSpec]:
    """Yields the runs of a page that the table is of."""
    judged = {arm for claim in ledger.on_runs_of(key) for arm in claim.arms}
    planned = [run for runs in plan.values() for run in runs]
    starts = {past.id for run in planned for past in run.lineage[1:]}
    lose_experts = {run.init.id for run in planned if run.drop is not None and run.init}
    for arm, runs in plan.items():
        for run in runs:
            dense = is_dense(run) and (arm in judged or run.id in starts)
            mixture = is_whole(run) and run.moe and arm in judged and run.id in lose_experts
            if dense or mixture:
                yield run


def _text_of(run: RunSpec) -> str:
    """Writes what runs of one way of training have in common."""

    def common(value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: common(part) for name, part in value.items() if name not in _ASIDE}

    return json.dumps(common(run.model_dump(mode="json")), sort_keys=True)


def page(keys: Sequence[str]) -> str:
    """Writes the generated table, MyST Markdown: a block for each data set; ways without a record
    are left out."""
    blocks: dict[str, list[Way]] = {}
    for way in (way for way in ways(keys) if way.accuracy):
        blocks.setdefault(way.spec.data.name, []).append(way)
    lines = []
    for data, same_data in blocks.items():
        lines += [
            f"**{TITLES.get(data, data)}**",
            "",
            "| pages | test top-1 (%) | how it was trained and tested |",
            "| --- " * 3 + "|",
            *_rows(same_data),
            "",
        ]
    return "\n".join(lines or ["No record yet.", ""])


def _rows(same_data: Sequence[Way]) -> Iterator[str]:
    """Writes the rows of a data set, those of the first one's backbone first.

    The first row says all of its way, the others in what theirs differ from it.
    """
    first = same_data[0]
    for way in sorted(same_data, key=lambda way: way.spec.backbone != first.spec.backbone):
        parts = way.parts
        differs = [part for name, part in parts.items() if part != first.parts[name]]
        if way is first:
            said = ", ".join(parts.values())
        else:
            other = ", ".join(differs) or "other settings, which are not named here"
            said = f"*as in the first row, but:* {other}"
        links = ", ".join(f"[{_breaking(key)}](notebooks/{key}.ipynb)" for key in way.pages)
        accuracy = re.sub(r"(\[[^,]*), ", r"\1,&nbsp;", way.accuracy)  # an interval does not break
        yield f"| {links} | {accuracy} | {said} |"


def _breaking(key: str) -> str:
    """Writes a page's path so that a narrow screen breaks it between words."""
    return key.replace("/", "/<wbr>").replace("_", "_<wbr>")
