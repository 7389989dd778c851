"""Published values and claims, read from `data/papers/NAME.yaml`: each value set with its source,
units and confidence."""

from __future__ import annotations

from typing import Any

import pandas as pd
import yaml

from .. import paths


def names() -> list[str]:
    """The papers that there are."""
    return sorted(path.stem for path in paths.PAPERS.glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """The content of one file: paper, tables, numbers, claims. Raises ValueError for an unknown
    name."""
    path = paths.PAPERS / f"{name}.yaml"
    if name not in names():
        raise ValueError(
            f"no published values called {name!r}: known are {', '.join(names()) or 'none'}; a new paper is a "
            f"file {path.relative_to(paths.ROOT)}"
        )
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def table(name: str, table_id: str) -> pd.DataFrame:
    """One value set as a frame; `.attrs` holds its source, units, confidence and what it is about."""
    tables = load(name)["tables"]
    if table_id not in tables:
        raise ValueError(f"{name} has no table {table_id!r}: it has {', '.join(tables)}")
    entry = dict(tables[table_id])
    frame = pd.DataFrame(entry.pop("rows"), columns=entry.pop("columns"))
    for column in frame.columns.intersection(["experts"]):
        frame[column] = frame[column].astype(
            "Int64"
        )  # integers with gaps: dense rows have no number of experts
    frame.attrs = entry
    return frame
