"""Draws values that may have an interval, or be absent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..verdicts.stats import Interval

Value = float | Interval | None


def _parts(values: Sequence[Value]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives means, and the distances down and up to the interval's ends (nan: no interval)."""
    rows = [(v.mean, v.low, v.high) if isinstance(v, Interval) else (v, None, None) for v in values]
    table = np.array(rows, float).reshape(-1, 3)  # None becomes nan
    mean, low, high = table.T
    return mean, mean - low, high - mean


def errorbar(ax, x, values: Sequence[Value], **kwargs) -> bool:
    """Draws points, with bars where an interval is known; False if there is nothing to draw."""
    mean, down, up = _parts(values)
    is_known = np.isfinite(mean)
    if not is_known.any():
        return False
    bars = np.nan_to_num(np.stack([down, up])[:, is_known], nan=0.0)
    ax.errorbar(
        np.asarray(x, float)[is_known],
        mean[is_known],
        yerr=bars if bars.any() else None,
        capsize=2.5,
        elinewidth=1,
        **kwargs,
    )
    return True
