"""Where the tokens of classes go: which classes look alike, and how far apart experts keep them.

Axis letters: **C** classes, **E** experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon

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


def class_distance(counts: np.ndarray, classes: Sequence[int]) -> float:
    """Computes the mean Jensen-Shannon distance between two of the classes, 0 to 1.

    counts: (C, E) tokens of each class by expert. The distance is the root of the divergence in
    bits.
    """
    shares = load_share(counts[list(classes)])
    pairs = [jensenshannon(a, b, base=2) for i, a in enumerate(shares) for b in shares[i + 1 :]]
    # Rounding may put the divergence of equal shares below 0, where it has no root.
    return float(np.nanmean(pairs))


def class_rows(record: Any, layer: int, classes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields a row for each class: its main expert, how many tokens of it and of all go there, and
    its Jensen-Shannon distance to all tokens.

    layer: index into the record's MoE layers.
    """
    counts = record.arrays["class_expert"][layer]
    share_of_all = load_share(counts.sum(0))
    for label in classes:
        share = load_share(counts[label])
        expert = int(share.argmax())
        yield {
            "class": str(record.class_names[label]).replace("_", " "),
            "its main expert": expert,
            "share (%)": 100 * share[expert],
            "of all tokens (%)": 100 * share_of_all[expert],
            "distance to all": float(jensenshannon(share, share_of_all, base=2)),
        }
