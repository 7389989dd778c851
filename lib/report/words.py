"""Says in words what a figure shows, for its alternative text, made of the values that are drawn.

No numbers: they stand in the table beside the figure. Scores of experts get their names here, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from ..verdicts.stats import Interval
from .figures import Curve

__all__ = [
    "change",
    "changes",
    "changes_by_panel",
    "extremes",
    "move",
    "order",
    "order_by_panel",
    "score",
]

# scores by which experts are dropped, where their name in a spec is not the word for it
_SCORES = {
    "router_norm_change_abs": "router norm change, absolute",
    "router_change": "norm of the router's change",
    "router_norm": "router norm after",
    "weight_change": "change of the expert",
    "dern": "DERN",
    "merge": "merging by output",
    **{name: name.upper() for name in ("ean", "man", "msan", "reap")},
}

LEVEL_WITHIN = 1.0  # points that the ends of a curve may lie apart if it stays level
Value = float | Interval | None


def _mean(value: Value) -> float | None:
    return value.mean if isinstance(value, Interval) else value


def order(values: Mapping[str, Value]) -> str:
    """Lists names from the highest value to the lowest, then those without one.

    "above" claims an order, which takes two intervals that lie apart; "then" is the next value.
    Commas within a name are left out, since they part the names.
    """
    named = {name.replace(",", ""): value for name, value in values.items()}
    there = {name: value for name, value in named.items() if value is not None}
    names = sorted(there, key=lambda name: -_mean(there[name]))
    text = "".join(names[:1])
    for before, name in pairwise(names):
        text += f", {_step(there[before], there[name])} {name}"
    absent = [name for name in named if name not in there]
    missing = f"no value yet of {', '.join(absent)}" if absent else ""
    return "; ".join(filter(None, [text, missing]))


def _step(higher: float | Interval, lower: float | Interval) -> str:
    if _mean(higher) == _mean(lower):
        return "level with"
    ends = [value.low is not None for value in (higher, lower) if isinstance(value, Interval)]
    return "above" if len(ends) == 2 and all(ends) and higher.low > lower.high else "then"


def order_by_panel(values_of_panel: Mapping[str, Mapping[str, Value]]) -> str:
    """Says the `order` of the values of each panel, one sentence a panel."""
    return " ".join(
        f"{title[:1].upper()}{title[1:]}: {order(values)}."
        for title, values in values_of_panel.items()
    )


def move(difference: Interval) -> str:
    """Says of a difference whether it is a rise or a fall beyond chance, by its interval."""
    if difference.low is None:
        return "too few seeds to say"
    if difference.low > 0:
        return "a rise"
    return "a fall" if difference.high < 0 else "no change beyond chance"


def change(values: Iterable[Value]) -> str:
    """Says whether values rise, fall or stay level, from the first that is there to the last."""
    means = [mean for mean in map(_mean, values) if mean is not None]
    if len(means) < 2:
        return "one value" if means else "no value yet"
    rise = means[-1] - means[0]
    if abs(rise) <= LEVEL_WITHIN:
        return "level"
    return "rising" if rise > 0 else "falling"


def changes(curves: Iterable[Curve]) -> str:
    """Sorts curves by the `change` of their values."""
    names_of_change: dict[str, list[str]] = {
        word: [] for word in ("rising", "level", "falling", "one value", "no value yet")
    }
    for curve in curves:
        names_of_change[change(curve.y)].append(curve.label.replace(",", ""))
    return "; ".join(
        f"{word} {', '.join(names)}" for word, names in names_of_change.items() if names
    )


def extremes(curves: Iterable[Curve], axis: str) -> str:
    """Says where each curve is lowest and where highest, for lines that go up and down.

    axis: what their x counts, such as "block".
    """
    said = []
    for curve in curves:
        at = {x: _mean(y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None}
        if len(set(at.values())) > 1:
            low, high = (_places(at, axis, end(at.values())) for end in (min, max))
            said.append(f"{curve.label}: lowest at {low}, highest at {high}")
        elif at:
            said.append(f"{curve.label}: one value")
    sentence = f"{'; '.join(said)}." if said else "no value yet."
    return sentence[:1].upper() + sentence[1:]


def _places(at: Mapping[float, float], axis: str, value: float) -> str:
    """Lists all places with a value: "block 3", "blocks 3, 7 and 9"."""
    *others, last = (str(x) for x, y in at.items() if y == value)
    return f"{axis}s {', '.join(others)} and {last}" if others else f"{axis} {last}"


def changes_by_panel(panels: Mapping[str, Sequence[Curve]]) -> str:
    """Says `changes` of the curves of each panel, one sentence a panel."""
    return " ".join(
        f"{title[:1].upper()}{title[1:]}: {changes(curves)}." for title, curves in panels.items()
    )


def score(name: str) -> str:
    """Returns what pages call a score of experts. name: as a spec has it, such as router_norm."""
    return _SCORES.get(name, name.replace("_", " "))
