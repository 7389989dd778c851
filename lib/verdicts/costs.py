"""Reads size and speed from records, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .stats import finished


def cost_rows(
    records: Mapping[str, Sequence[Any]],
    limit: str | None = None,
    keys: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one row for each name with a finished record, of its first seed.

    A row has the parameters in millions, the multiply-adds in billions, and the images a second in
    training and evaluation. limit: name of the dense runs that bound the others; rows then also
    have "limit (images/s)", the dense training speed times the ratio of multiply-adds, and the
    share of it that is reached. keys: the names in their order; None = all.
    """
    bound = finished(records.get(limit, []))[:1] if limit else []
    for name in records if keys is None else [key for key in keys if key in records]:
        for record in finished(records[name])[:1]:
            speed = record.timing.get("train_images_per_s")
            row = {
                "model": name,
                "stored (M)": record.cost["params_stored"] / 1e6,
                "active (M)": record.cost["params_active"] / 1e6,
                "MACs (G)": record.cost["macs"] / 1e9,
                "training (images/s)": speed,
                "evaluation (images/s)": record.timing["eval_images_per_s"],
            }
            if bound and speed is not None:
                fastest = bound[0].timing["train_images_per_s"]
                ceiling = fastest * bound[0].cost["macs"] / record.cost["macs"]
                row |= {"limit (images/s)": ceiling, "share of limit": f"{speed / ceiling:.2f}"}
            yield row
