"""Measures the ways of classes through a whole model, and what colour alone does to a router.

After Durham, Figures 7 to 9, 12 and 13. The main route of a class is the expert that gets most of
its tokens in each MoE layer, the main expert of an image the one that gets most of its tokens in a
layer.

Axis letters: **M** MoE layers from the shallowest to the deepest, **C** classes, **E** experts,
**I** test images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import chain, combinations
from typing import Any

import numpy as np

from ..measure.routing import BOARD_CELLS, load_share
from .masks import CLASS_TOKENS
from .routing import information


def main_route(record: Any, label: int) -> tuple[list[int], list[float]]:
    """Finds the expert that gets most of a class's tokens in each layer, and its share.

    (M,) each, shallow to deep.
    """
    share = load_share(record.arrays["class_expert"][:, label])
    return share.argmax(1).tolist(), share.max(1).tolist()


def main_expert(record: Any) -> np.ndarray:
    """Finds the expert of the last MoE layer that gets most of the tokens of each test image: (I,).

    Of experts with equally many the first. Raises ValueError for a record without these counts.
    """
    if "image_loads" not in record.arrays:
        raise ValueError(
            f"record {record.id} holds no tokens of single images: give a record whose spec has "
            "image_loads"
        )
    return record.arrays["image_loads"][:, -1].argmax(1)


def images_by_expert(record: Any) -> np.ndarray:
    """Counts the test images of each class by their `main_expert`: (C, E)."""
    experts = len(record.moe[-1]["load"])
    table = np.zeros((record.arrays["class_expert"].shape[1], experts), int)
    np.add.at(table, (record.arrays["test_label"], main_expert(record)), 1)
    return table


def purity(table: np.ndarray) -> float:
    """Computes the share, in percent, of images whose class is the most common of their expert.

    table: (C, E) counts. 100 where each expert has images of one class.
    """
    return 100 * float(table.max(0).sum() / table.sum())


def widest_route(record: Any) -> float:
    """Computes the share of the classes, in percent, that the most common main route has."""
    classes_of_route = Counter(_route_of_class(record).values())
    return 100 * max(classes_of_route.values()) / classes_of_route.total()


def pairs_on_one_route(record: Any, *groups: Collection[str]) -> tuple[float, float]:
    """Computes the share of pairs of classes, in percent, that have one main route.

    groups: the names of classes that belong together, two or more in each and not all of the
    record's. First of the pairs inside a group, then of the pairs of one in a group and a class
    outside it.
    """
    route = _route_of_class(record)

    def share_of_pairs(pairs: Iterable[tuple[str, str]]) -> float:
        return 100 * float(np.mean([route[a] == route[b] for a, b in pairs]))

    inside = chain.from_iterable(combinations(group, 2) for group in groups)
    across = ((a, b) for group in groups for a in group for b in route if b not in group)
    return share_of_pairs(inside), share_of_pairs(across)


def shared_route_excess(record: Any, together: Collection[str]) -> float:
    """Computes how much more often two classes that belong together have one main route, in points.

    The difference of `pairs_on_one_route`: 0 where routes have nothing to do with what belongs
    together, a collapsed router included, and at most 100.
    """
    inside, mixed = pairs_on_one_route(record, together)
    return inside - mixed


def colour_information(record: Any) -> float | None:
    """Computes how far colour determines the expert of a patch of the checkerboard, 0 to 1.

    I(colour; expert) / H(expert), corrected for the number of patches; mean over layers. Patches of
    both colours and those that no expert took are left out. Either colour stands at all places of
    the board alike, so that routing by place gives 0. None where every patch has both colours.
    """
    share = _second_colour(record)
    is_pure = (share == 0) | (share == 1)
    values = []
    for expert_of_patch in record.arrays["checker_expert"][:, CLASS_TOKENS:]:
        counted = is_pure & (expert_of_patch >= 0)
        if not counted.any():
            continue
        table = np.zeros((2, int(expert_of_patch.max()) + 1))  # (colours, E)
        np.add.at(table, (share[counted].astype(int), expert_of_patch[counted]), 1)
        values.append(information(table).corrected)
    return float(np.mean(values)) if values else None


def _route_of_class(record: Any) -> dict[str, tuple[int, ...]]:
    names = record.class_names
    return {name: tuple(main_route(record, label)[0]) for label, name in enumerate(names)}


def _second_colour(record: Any) -> np.ndarray:
    """Computes the share of the second colour in each patch of the board: (patches,)."""
    pixels = record.spec.data.image_size
    cell = np.arange(pixels) * BOARD_CELLS // pixels
    board = (cell[:, None] + cell) % 2
    patches = record.arrays["checker_expert"].shape[1] - CLASS_TOKENS
    rows = round(patches**0.5)
    # (rows, pixels of a patch, columns, pixels of a patch): one cell a patch
    return board.reshape(rows, pixels // rows, rows, pixels // rows).mean((1, 3)).ravel()
