"""Reads sizes from records, as rows of a table.

Records hold times, too, but other work ran beside them: `speed` reads what was timed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .stats import finished


def cost_rows(
    records: Mapping[str, Sequence[Any]],
    dense: str | None = None,
    keys: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one row for each name with a finished record, of its first seed.

    A row has the parameters in millions and the multiply-adds in billions. dense: name of the runs
    to whose multiply-adds the others' are compared; rows then have "MACs (% of dense)" as well.
    keys: the names in their order; None = all.
    """
    compared = finished(records.get(dense, []))[:1] if dense else []
    for name in records if keys is None else [key for key in keys if key in records]:
        for record in finished(records[name])[:1]:
            row = {
                "model": name,
                "stored (M)": record.cost["params_stored"] / 1e6,
                "active (M)": record.cost["params_active"] / 1e6,
                "MACs (G)": record.cost["macs"] / 1e9,
            }
            if compared:
                row["MACs (% of dense)"] = 100 * record.cost["macs"] / compared[0].cost["macs"]
            yield row
