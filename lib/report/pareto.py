"""Lets a reader of a published page ask which models are good enough and cheap enough: two sliders,
a plot and a sentence, drawn by `book/_static/pareto.js` from data beside the figure."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from IPython.display import HTML

from ..spec import RunSpec
from ..verdicts.budgets import TIMED, forward_times
from ..verdicts.sizes import retained_change
from ..verdicts.stats import finished

SIZES = ("macs", "params_stored")


@dataclass(frozen=True)
class Point:
    """Holds a model made from a dense one.

    loss: of test accuracy against the dense model, in points, with the ends of its interval over
    seeds and test images, None below three seeds; n: seeds. macs, stored: multiply-adds of an image
    and stored parameters, in percent of the dense model's; time: that of a forward pass likewise,
    None where it was not measured.
    """

    name: str
    loss: float
    low: float | None
    high: float | None
    n: int
    macs: float
    stored: float
    time: float | None = None


def points_of(
    records: Mapping[str, Sequence[Any]], timed: Mapping[str, Sequence[RunSpec]] | None = None
) -> list[Point]:
    """Makes the points of all names of runs that start from the first finished one named "dense".

    Losses are those that verdicts judge (`retained_change`), with the same intervals, in points of
    that run's accuracy instead of in percent of it. timed: the runs of `beyond/frontier`, some of
    whose models have a measured time. Whatever is extracted from the same dense model by the same
    rules takes the same time, finetuned or not.
    """
    whole = next(iter(finished(records.get("dense", []))), None)
    if whole is None:
        return []
    measured = forward_times()
    times = [(runs[0], measured[name]) for name, runs in (timed or {}).items() if name in measured]
    points = []
    for name, group in records.items():
        done = [run for run in finished(group) if run.spec.init and run.spec.init.id == whole.id]
        change = retained_change(done, [whole])
        if change is None:
            continue
        ends = (change.mean, change.high, change.low)  # the highest accuracy is the lowest loss
        losses = (None if end is None else -end / 100 * whole.test["top1"] for end in ends)
        shares = (100 * done[0].cost[size] / whole.cost[size] for size in SIZES)
        points.append(Point(name, *losses, change.n, *shares, _time_of(done[0].spec, times)))
    return points


def _time_of(run: RunSpec, times: Sequence[tuple[RunSpec, float]]) -> float | None:
    """Finds the time of a run's model, by the dense model and the rules that it comes from."""
    if run.extract is None:
        return None
    made_of = run.init.id, run.extract
    same = (time for spec, time in times if spec.init and (spec.init.id, spec.extract) == made_of)
    return next(same, None)


def explorer(points: Sequence[Point], data: str, loss: float = 2.0, faster: float = 1.5) -> HTML:
    """Puts the explorer on a page; without JavaScript it says where the same numbers stand.

    data: name of the images that accuracies are of. loss: points of accuracy that a model may lose
    at most, at first; faster: the factor that its cost is to be lower by, at first. A reader can
    have times in place of multiply-adds where some are known. Raises ValueError without a point.
    """
    if not points:
        raise ValueError("no model has a record beside one of the dense model: compute some first")
    timed_at = ", ".join(TIMED)
    printed = json.dumps([_as_printed(point) for point in points], allow_nan=False)
    return HTML(
        f'<div class="pareto" data-points="{html.escape(printed)}" '
        f'data-images="{html.escape(data)}" data-timed="{timed_at}" '
        f'data-loss="{loss:g}" data-cost="{100 / faster:.1f}">'
        "<noscript>The table and the figure on this page have the same numbers but for times; "
        "with JavaScript two sliders search them.</noscript></div>"
    )


def _as_printed(point: Point) -> dict[str, Any]:
    """Rounds numbers to the digit that is shown, so that a model which "loses 2.0 points" is one
    that loses at most 2.0."""
    numbers = asdict(point)
    # + 0.0 makes 0.0 of -0.0
    return {k: round(x, 1) + 0.0 if isinstance(x, float) else x for k, x in numbers.items()}
