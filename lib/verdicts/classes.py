"""Where the tokens of classes go: which classes look alike, and how far apart experts keep them.

Axis letters: **C** classes, **E** experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import rel_entr

from ..measure.routing import load_share


def confusion(record: Any) -> np.ndarray:
    """Counts the test images (C, C) of each class (row) by the class that is predicted (column)."""
    labels, predictions = (record.arrays[key].astype(int) for key in ("test_label", "test_pred"))
    table = np.zeros((len(record.class_names),) * 2)
    np.add.at(table, (labels, predictions), 1)
    return table


def look_alike_classes(record: Any, count: int) -> list[int]:
    """Chooses the most confused class and the `count` - 1 that it is confused with most often.

    A confusion counts in both directions. record: of a model without experts, so that no routing
    has a part in the choice.
    """
    table = confusion(record)
    confused = table + table.T
    np.fill_diagonal(confused, 0)
    first = int(confused.sum(1).argmax())
    return [first, *(int(c) for c in np.argsort(-confused[first])[: count - 1])]


def spaced_classes(classes: int, count: int) -> list[int]:
    """Chooses `count` classes, evenly spaced over their list, the first and last included."""
    return np.linspace(0, classes - 1, count).round().astype(int).tolist()


def class_distance(counts: np.ndarray, classes: Sequence[int] | None = None) -> float:
    """Computes the mean Jensen-Shannon distance between two of the classes, 0 to 1.

    counts: (C, E) tokens of each class by expert. classes: those whose pairs count; None = all. The
    distance is the root of the divergence in bits.
    """
    shares = load_share(counts if classes is None else counts[list(classes)])
    first, second = np.triu_indices(len(shares), 1)
    a, b = shares[first], shares[second]  # (pairs, E)
    middle = (a + b) / 2
    divergence = (rel_entr(a, middle) + rel_entr(b, middle)).sum(-1) / (2 * np.log(2))
    # rounding may put the divergence of equal shares below 0, where it has no root
    return float(np.sqrt(divergence.clip(min=0)).mean())
