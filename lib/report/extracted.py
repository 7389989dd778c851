"""What an extraction was asked to do, and what it did, as cells of a table."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..spec import ExtractSpec


def rules_row(rules: ExtractSpec) -> dict[str, Any]:
    """Returns the rules of an extraction by column name; a static model has no clusters."""
    correction = rules.correction
    return {
        "clusters": None if rules.static else rules.clusters.count,
        "kept by": rules.neurons.score,
        "share by": rules.neurons.budget,
        "weight of all tokens": f"{correction.pooled:g}",
        "penalty": f"{correction.penalty:g}",
        "made up for": f"{correction.catch_up:g}",
        "images": rules.calibration.images,
    }


def active_by_block(record: Any) -> dict[str, float]:
    """Computes the percentage of each block's neurons that a token passes on average, rounded.

    Blocks are numbered from 1, the first. Their mean is the share that the extraction was asked
    for: a record counts the neurons that are active and not those of the dense block, which are
    equally many in all blocks.
    """
    active = np.array([row["active"] for row in record.extract])
    shares = (100 * record.spec.extract.neurons.active * active / active.mean()).round()
    return {str(block): float(share) for block, share in enumerate(shares, 1)}
