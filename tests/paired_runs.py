"""Stand-ins for records of which only the seed and the test predictions matter."""

from types import SimpleNamespace

import numpy as np


def runs(right, name="", seeds=None, device="cpu"):
    """Records with given correctness (S, I), named after their side and seed."""
    right = np.asarray(right, int)
    seeds = range(len(right)) if seeds is None else seeds
    return [
        SimpleNamespace(
            id=f"{name}{seed}",
            status="ok",
            spec=SimpleNamespace(seed=seed, device=device),
            arrays={"test_label": np.zeros(row.size, int), "test_pred": 1 - row},
        )
        for seed, row in zip(seeds, right, strict=True)
    ]


def right_of(*percents, images=200):
    return [np.arange(images) < round(images * percent / 100) for percent in percents]
