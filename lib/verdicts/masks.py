"""Computes what the masks of experts show: the expert that each patch of some images goes to.

Each number is 0 on average where the masks have nothing of what it looks for, and can be negative.

Axis letters: **P** images, **h**, **w** rows and columns of patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "CLASS_TOKENS",
    "cohesion",
    "differ_by_label",
    "first_choices",
    "probe_labels",
    "probes_of_classes",
]


CLASS_TOKENS = 1  # before the patches, in the tokens of records


def first_choices(record: Any, layer: int) -> np.ndarray:
    """Returns (P, h, w) the expert that each patch of the probe images has as its first choice.

    The grid of patches is square.
    """
    patches = record.arrays["token_expert"][layer][:, CLASS_TOKENS:]
    side = round(patches.shape[1] ** 0.5)
    return patches.reshape(-1, side, side)


def probe_labels(record: Any) -> np.ndarray:
    """Returns (P,) the class of each probe image.

    Records hold the classes of the whole test split, (n,), over which the probe images are evenly
    spread, unless the record has their places in it.
    """
    labels = record.arrays["test_label"]
    if "probe_place" in record.arrays:
        return labels[record.arrays["probe_place"]]
    places = np.linspace(0, len(labels) - 1, len(record.arrays["probe_index"]))
    return labels[places.astype(int)]


def probes_of_classes(record: Any, classes: int, count: int) -> list[int]:
    """Chooses `count` probe images, or as many as there are, of each of so many classes.

    Returns their places among the probe images, class by class. The classes are those that the
    probe images have first.
    """
    labels = probe_labels(record)
    chosen = sorted(list(dict.fromkeys(labels.tolist()))[:classes])
    return [int(i) for label in chosen for i in np.flatnonzero(labels == label)[:count]]


def cohesion(expert_of_patch: np.ndarray) -> float:
    """Computes how much likelier neighbouring patches share an expert than any two patches do.

    expert_of_patch: (P, h, w). Neighbours are beside or below each other. Returns the share of
    neighbours less the share of all pairs of one image, mean over images: 0 on average where the
    experts of an image are shuffled, below 1 where they come in large pieces.
    """
    masks = np.asarray(expert_of_patch)
    beside = masks[:, :, 1:] == masks[:, :, :-1]
    below = masks[:, 1:] == masks[:, :-1]
    neighbours = (beside.sum((1, 2)) + below.sum((1, 2))) / (beside[0].size + below[0].size)
    flat = masks.reshape(len(masks), -1)
    patches = flat.shape[1]
    same = (flat[:, :, None] == flat[:, None]).sum((1, 2))  # a patch with itself among them
    return float((neighbours - (same - patches) / (patches * (patches - 1))).mean())


def differ_by_label(expert_of_patch: np.ndarray, labels: np.ndarray) -> float:
    """Computes how much more the masks of images of different labels differ than those of one.

    expert_of_patch: (P, ...). labels: (P,). Two masks differ by the share of places with different
    experts. Returns the mean over pairs of images of different labels less that over pairs of one
    label: 0 on average where labels are shuffled, 1 where the label alone decides. Raises
    ValueError unless there are pairs of both kinds.
    """
    masks, labels = np.asarray(expert_of_patch).reshape(len(labels), -1), np.asarray(labels)
    apart = (masks[:, None] != masks[None]).mean(2)  # (P, P)
    pairs = np.triu(np.ones_like(apart, bool), 1)
    same = labels[:, None] == labels[None]
    if not (pairs & same).any() or not (pairs & ~same).any():
        raise ValueError(
            f"labels {labels.tolist()} have no pairs of both kinds: "
            "give two images of one label and one of another"
        )
    return float(apart[pairs & ~same].mean() - apart[pairs & same].mean())
