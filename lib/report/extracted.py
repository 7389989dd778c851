"""What an extraction was asked to do, and what it did, as cells of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from ..spec import ExtractSpec
from ..verdicts import ledger
from ..verdicts.layers import layer_mean
from ..verdicts.sizes import Family
from ..verdicts.stats import accuracy_interval, finished, retained, same_seed


def called(arm: str) -> str:
    """Returns what pages call an extraction of the study MoEE, by its reading and percentage.

    arm: "p = 80", the reading as printed, or "working, p = 80", which stays as it is.
    """
    return f"as printed, {arm}" if arm.startswith("p = ") else arm


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
        "head": None if correction.head is None else f"{correction.head:g}",
        "images": rules.calibration.images,
    }


def extraction_row(records: Sequence[Any]) -> dict[str, Any]:
    """Returns what an extraction kept and found, by column name.

    records: of one reading, one a seed. Test top-1 is over all of them, the rest of the first that
    is finished; every cell is None without one.
    """
    row = dict.fromkeys(("validation top-1 (%)", "test top-1 (%)", "active (%)", "stored (M)"))
    row |= dict.fromkeys(("noise (%)", "clusters a layer"))
    for record in finished(records)[:1]:
        row |= {
            "validation top-1 (%)": record.val["top1"],
            "test top-1 (%)": accuracy_interval(records),
            "active (%)": 100 * active_share(record),
            "stored (M)": record.cost["params_stored"] / 1e6,
            "noise (%)": 100 * layer_mean(record.extract, itemgetter("noise")),
            "clusters a layer": layer_mean(record.extract, itemgetter("clusters")),
        }
    return row


def active_share(record: Any) -> float:
    """Computes the share of a dense layer's neurons that a token passes, mean over layers."""
    hidden = record.spec.backbone.hidden  # None: timm's ViTs have four times the width
    shares = [layer["active"] / (hidden or 4 * layer["width"]) for layer in record.extract]
    return float(np.mean(shares))


def by_active_share(arms: Iterable[Sequence[Any]]) -> dict[float, list[Any]]:
    """Makes a family of arms that were asked for no share of active neurons.

    arms: records of one setting each. Returns {active share of its first finished record, rounded
    to a percent: its records}; an arm without one is left out.
    """
    done = [finished(records) for records in arms]
    return {round(active_share(records[0]), 2): records for records in done if records}


def rows_by_block(families: Mapping[str, Family]) -> Iterator[dict[str, Any]]:
    """Yields a row for each level and method: what its first finished record has active by
    block."""
    for level in dict.fromkeys(level for family in families.values() for level in family):
        for method, family in families.items():
            for record in finished(family.get(level, []))[:1]:
                yield {"active": f"{100 * level:g}%", "arm": method, **active_by_block(record)}


def active_by_block(record: Any) -> dict[str, float]:
    """Computes the percentage of each block's neurons that a token passes on average, rounded.

    Blocks are numbered from 1, the first. Their mean is the share that the extraction was asked
    for: a record counts the neurons that are active and not those of the dense block, which are
    equally many in all blocks.
    """
    active = np.array([row["active"] for row in record.extract])
    shares = (100 * record.spec.extract.neurons.active * active / active.mean()).round()
    return {str(block): float(share) for block, share in enumerate(shares, 1)}


def goal_of(claim: str) -> float:
    """Returns the percentage of the dense accuracy that a claim of the ledger asks for."""
    return 100 - ledger.claims()[claim].smallest


def moves(tried: Mapping[str, tuple[Sequence[Any], Sequence[Any]]], dense: Sequence[Any]) -> str:
    """Says by how much each change moves the percentage of the dense accuracy that is kept.

    tried: what was changed: (records with the change, records without), of which those seeds count
    that both have. A change without records is left out.
    """
    said = []
    for what, (changed, plain) in tried.items():
        pairs = same_seed(changed, plain)
        if pairs and finished(dense):
            after, before = (retained(side, dense) for side in zip(*pairs, strict=True))
            said.append(f"{what} {after.mean - before.mean:+.1f} (n={len(pairs)})")
    return "; ".join(said)
