"""Measures the ways of classes through a whole model, and what colour alone does to a router.

After Durham, Figures 7 to 9, 12 and 13. The main route of a class is the expert that gets most of
its tokens in each MoE layer, the main expert of an image the one that gets most of its tokens in a
layer.

Axis letters: **M** MoE layers from the shallowest to the deepest, **C** classes, **E** experts,
**I** test images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import combinations, product
from typing import Any

import numpy as np

from ..measure.routing import load_share
from .routing import information

BOARD_CELLS = 4  # squares in a row of the checkerboard that records hold the routing of


def main_route(record: Any, label: int) -> tuple[list[int], list[float]]:
    """Finds the expert that gets most of a class's tokens in each layer, and its share.

    (M,) each, shallow to deep.
    """
    share = load_share(record.arrays["class_expert"][:, label])
    return share.argmax(1).tolist(), share.max(1).tolist()


def main_expert(record: Any, layer: int = -1) -> np.ndarray:
    """Finds the expert that gets most of the tokens of each test image: (I,).

    Of experts with equally many the first. Raises ValueError for a record without these counts.
    """
    if "image_loads" not in record.arrays:
        raise ValueError(
            f"record {record.id} holds no tokens of single images: give a record whose spec has "
            "image_loads"
        )
    return record.arrays["image_loads"][:, layer].argmax(1)


def images_by_expert(record: Any, layer: int = -1) -> np.ndarray:
    """Counts the test images of each class by their main expert: (C, E)."""
    experts = len(record.moe[layer]["load"])
    table = np.zeros((record.arrays["class_expert"].shape[1], experts), int)
    np.add.at(table, (record.arrays["test_label"], main_expert(record, layer)), 1)
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


def pairs_on_one_route(record: Any, together: Collection[str]) -> tuple[float, float]:
    """Computes the share of pairs of classes, in percent, that have one main route.

    together: the names of classes that belong together, two or more, and not all of the record's.
    First of their pairs, then of the pairs of one of them and another class.
    """
    route = _route_of_class(record)
    others = [name for name in route if name not in together]

    def share_of_pairs(pairs: Any) -> float:
        return 100 * float(np.mean([route[a] == route[b] for a, b in pairs]))

    return share_of_pairs(combinations(together, 2)), share_of_pairs(product(together, others))


def shared_route_excess(record: Any, together: Collection[str]) -> float:
    """Computes how much more often two classes that belong together have one main route, in points.

    The difference of `pairs_on_one_route`: 0 where routes have nothing to do with what belongs
    together, a collapsed router included, and at most 100.
    """
    inside, mixed = pairs_on_one_route(record, together)
    return inside - mixed


def colour_information(record: Any, prefix: int = 1) -> float | None:
    """Computes how far colour determines the expert of a patch of the checkerboard, 0 to 1.

    I(colour; expert) / H(expert), corrected for the number of patches; mean over layers. Patches of
    both colours and those that no expert took are left out. Either colour stands at all places of
    the board alike, so that routing by place gives 0. prefix: tokens before the patches. None where
    every patch has both colours.
    """
    share = _second_colour(record, prefix)
    is_pure = (share == 0) | (share == 1)
    values = []
    for expert_of_patch in record.arrays["checker_expert"][:, prefix:]:
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


def _second_colour(record: Any, prefix: int) -> np.ndarray:
    """Computes the share of the second colour in each patch of the board: (patches,)."""
    pixels = record.spec.data.image_size
    cell = np.arange(pixels) * BOARD_CELLS // pixels
    board = (cell[:, None] + cell) % 2
    patches = record.arrays["checker_expert"].shape[1] - prefix
    rows = round(patches**0.5)
    # (rows, pixels of a patch, columns, pixels of a patch): one cell a patch
    return board.reshape(rows, pixels // rows, rows, pixels // rows).mean((1, 3)).ravel()
