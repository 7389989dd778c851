"""Accuracy against compute and storage of models made of one dense model: rows, curves, the front.

What is drawn are `verdicts.sizes.SizedModel`s; those without a record are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..verdicts.sizes import SizedModel
from . import figures, relations, words

_AXES = {
    "macs": "multiply-adds (% of the dense model's)",
    "params_stored": "stored parameters (% of the dense model's)",
}


def rows(models: Iterable[SizedModel]) -> Iterator[dict[str, Any]]:
    """Yields a row of a table for each model, empty cells where it has no record."""
    for model in models:
        yield {
            "active": f"{100 * model.level:g}%",
            "method": model.method,
            "top-1 (%)": model.top1,
            "of the dense (%)": model.retained and model.retained.mean,
            "MACs (% of dense)": model.macs,
            "stored (% of dense)": model.params_stored,
        }


def accuracy_over(
    panels: Mapping[str, Sequence[SizedModel]], size: str, methods: Iterable[str]
) -> Figure:
    """Draws test accuracy over size, a line a method, one panel a source.

    Lines that fall below half of the best one would press all others together: where there are
    some, a second panel shows the others alone, on a scale of its own. size: "macs" or
    "params_stored". methods: those that are drawn, in the order of their colours.
    """
    shown, drawn = list(methods), {}
    for title, models in panels.items():
        drawn[title] = curves = _curves(models, size, shown)
        upper = _upper(curves)
        if len(upper) < len(curves):
            drawn[f"{title}, the upper lines alone"] = upper
    return figures.scan(drawn, xlabel=_AXES[size], ylabel="accuracy (%)")


def order_over(models: Iterable[SizedModel], size: str, methods: Iterable[str]) -> str:
    """Says in which order `accuracy_over` draws its lines at the smallest size that all have, and
    what a second panel leaves out, for those who do not see it."""
    models, shown = list(models), list(methods)
    curves = _curves(models, size, shown)
    upper = {curve.label for curve in _upper(curves)}
    low = [curve.label.replace(",", "") for curve in curves if curve.label not in upper]
    alone = f" A second panel leaves out the lowest: {', '.join(low)}." if low else ""
    if size == "macs":
        # lines begin at different sizes: they are compared at the smallest that all have
        at = max((curve.x[0] for curve in curves), default=0)
        rank = f"At {at:g}% of the multiply-adds, from the most accurate down"
        values = {
            curve.label: float(np.interp(at, curve.x, [top1.mean for top1 in curve.y]))
            for curve in curves
        }
    else:
        there = [m for m in models if m.method in shown and m.top1 is not None]
        smallest = {m.method: m for m in sorted(there, key=lambda m: -m.level)}
        rank = "By what their smallest model stores, from the most down"
        values = {method: m.params_stored for method, m in smallest.items()}
    axis = _AXES[size].partition(" (")[0]
    lines = f"Line plot of accuracy over {axis}, one line a method."
    return f"{rank}: {words.order(values)}.{alone} {lines}"


def _upper(curves: Sequence[figures.Curve]) -> Sequence[figures.Curve]:
    """Picks the lines that stay above half of the best one; all, if the rest would not gain by a
    panel of their own: where one line alone is left, or none is left out."""
    lowest = {curve.label: min(top1.mean for top1 in curve.y) for curve in curves}
    upper = [c for c in curves if lowest[c.label] >= max(lowest.values()) / 2]
    return upper if len(upper) > 1 else curves


def _curves(models: Sequence[SizedModel], size: str, methods: Sequence[str]) -> list[figures.Curve]:
    curves = []
    for method in methods:
        drawn = [m for m in models if m.method == method and m.top1 is not None]
        drawn.sort(key=lambda model: getattr(model, size))
        if drawn:
            x = [round(getattr(model, size), 1) for model in drawn]
            curves.append(figures.Curve(x, [model.top1 for model in drawn], method))
    return curves


def front_rows(models: Iterable[SizedModel]) -> Iterator[dict[str, Any]]:
    """Yields a row for each model that none beats in one of three without losing in another.

    The three are multiply-adds, stored parameters and test accuracy; sizes as they are printed.
    """
    measured = [model for model in models if model.top1 is not None]
    costs = [(round(m.macs, 1), round(m.params_stored, 1), -m.top1.mean) for m in measured]
    for model, on_front in zip(measured, relations.front(costs), strict=True):
        if on_front:
            yield {
                "method": f"{model.method}, {100 * model.level:g}%",
                "MACs (% of dense)": model.macs,
                "stored (% of dense)": model.params_stored,
                "top-1 (%)": model.top1,
            }


def surface(
    panels: Mapping[str, Sequence[SizedModel]], is_mixture: Callable[[str], bool]
) -> Figure:
    """Draws compute against storage with accuracy as colour; see `relations.surface`.

    A panel without a record is left out. is_mixture: whether a method, by its name, has experts.
    """
    spots = {
        title: [
            relations.Spot(m.method, m.macs, m.params_stored, m.top1.mean, is_mixture(m.method))
            for m in models
            if m.top1 is not None
        ]
        for title, models in panels.items()
    }
    return relations.surface({title: drawn for title, drawn in spots.items() if drawn})
