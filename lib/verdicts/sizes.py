"""Models made of one dense model: accuracy and size beside it.

A *family* is what one method gives at its levels, such as shares of active neurons:
{level: records, one a seed}. Families are kept by the name of their method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .stats import MIN_SEEDS, Interval, accuracy_interval, finished, retained

Family = Mapping[float, Sequence[Any]]


@dataclass(frozen=True)
class SizedModel:
    """One method at one level; every number is None where it or the dense model has no record.

    macs, params_stored: percent of the dense model's, of the first seed. top1: test top-1 in
    percent. retained: top-1 in percent of the dense model's.
    """

    method: str
    level: float
    macs: float | None = None
    params_stored: float | None = None
    top1: Interval | None = None
    retained: Interval | None = None


def sized_models(families: Mapping[str, Family], dense: Sequence[Any]) -> list[SizedModel]:
    """Measures every method at every level against the dense model, level by level.

    A level that a family does not have is left out.
    """
    levels = dict.fromkeys(level for family in families.values() for level in family)
    return [
        _sized(method, level, family[level], dense)
        for level in levels
        for method, family in families.items()
        if level in family
    ]


def _sized(method: str, level: float, records: Sequence[Any], dense: Sequence[Any]) -> SizedModel:
    done, whole = finished(records)[:1], finished(dense)[:1]
    if not done or not whole:
        return SizedModel(method, level)
    shares = (100 * done[0].cost[key] / whole[0].cost[key] for key in ("macs", "params_stored"))
    return SizedModel(method, level, *shares, accuracy_interval(records), retained(records, dense))


def retained_change(records: Sequence[Any], dense: Sequence[Any]) -> Interval | None:
    """Computes how far test top-1 is from the dense model's, in percent of it: -2 keeps 98%.

    records, dense: as of `stats.retained`, whose interval it has.
    """
    share = retained(records, dense)
    if share is None or share.low is None:
        return share and replace(share, mean=share.mean - 100)
    law = replace(share.law, mean=share.law.mean - 100)
    ends = {name: getattr(share, name) - 100 for name in ("mean", "low", "high")}
    return replace(share, **ends, law=law)


def best_on_validation(settings: Mapping[str, Sequence[Any]]) -> str | None:
    """Chooses the setting with the best mean validation top-1; None without a finished record.

    Settings take part that have MIN_SEEDS finished seeds, or, where none has, the most that one
    has. The means are over the seeds that all of these have: further seeds of one setting do not
    decide. Test images have no say. Raises ValueError where these settings share no seed.
    """
    done = {name: {r.spec.seed: r for r in finished(rs)} for name, rs in settings.items()}
    enough = min(MIN_SEEDS, max(map(len, done.values()), default=0))
    done = {name: of_seed for name, of_seed in done.items() if enough and len(of_seed) >= enough}
    if not done:
        return None
    shared = set.intersection(*(set(of_seed) for of_seed in done.values()))
    if not shared:
        raise ValueError(f"{', '.join(done)} share no seed: which of them is best is not known")
    means = {
        name: np.mean([of_seed[seed].val["top1"] for seed in sorted(shared)])
        for name, of_seed in done.items()
    }
    return max(means, key=means.get)
