"""Lets a reader of a published page ask which models are good enough and cheap enough: two sliders,
a plot and a sentence, drawn by `book/_static/pareto.js` from data beside the figure."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from IPython.display import HTML

from ..verdicts.stats import finished
from ..verdicts.values import value_interval


@dataclass(frozen=True)
class Point:
    """Holds a model made from a dense one.

    loss: of test accuracy against the dense model, in points, with the ends of its interval, None
    where one seed has none; n: seeds. macs, stored: multiply-adds of an image and stored
    parameters, in percent of the dense model's.
    """

    name: str
    loss: float
    low: float | None
    high: float | None
    n: int
    macs: float
    stored: float


def points_of(records: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Makes the points of all names of runs that start from one of the runs named "dense", each
    against the model that it starts from."""
    whole = {record.id: record for record in finished(records.get("dense", []))}

    def start(run: Any) -> Any:
        return whole[run.spec.init.id]

    points = []
    for name, group in records.items():
        done = [run for run in finished(group) if run.spec.init and run.spec.init.id in whole]
        if not done:
            continue
        gain = value_interval(done, lambda run: run.test["top1"] - start(run).test["top1"])
        low, high = (None, None) if gain.low is None else (-gain.high, -gain.low)
        share = {part: 100 * done[0].cost[part] / start(done[0]).cost[part] for part in SIZES}
        points.append(Point(name, -gain.mean, low, high, gain.n, *share.values()))
    return points


SIZES = ("macs", "params_stored")


def explorer(points: Sequence[Point], loss: float = 2.0, faster: float = 1.5) -> HTML:
    """Puts the explorer on a page; without JavaScript it says where the same numbers stand.

    loss: points of accuracy that a model may lose at most, at first; faster: the factor that its
    multiply-adds are to be fewer by, at first. Raises ValueError without a point.
    """
    if not points:
        raise ValueError("no model has a record beside one of the dense model: compute some first")
    data = json.dumps([asdict(point) for point in points], allow_nan=False)
    return HTML(
        f'<div class="pareto" data-points="{html.escape(data)}" data-loss="{loss:g}" '
        f'data-macs="{100 / faster:.1f}"><noscript>The table and the figure on this page have '
        "the same numbers; with JavaScript two sliders search them.</noscript></div>"
    )
