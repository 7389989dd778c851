"""Reads published values, items and claims from `data/papers/NAME.yaml`.

Each set of values comes with its source, units and confidence.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import paths

if TYPE_CHECKING:
    import pandas as pd


def names() -> list[str]:
    """Lists the papers that there are."""
    return sorted(path.stem for path in paths.PAPERS.glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """Reads a file: paper, tables, numbers, items, claims, answers.

    Raises ValueError for an unknown name.
    """
    return copy.deepcopy(_loaded(name))


def read(path: Path) -> dict[str, Any]:
    """Reads a file of published values, once as long as it stays as it is; not to be changed."""
    # a file that changes is read again: tests and live notebooks change them
    stamp = path.stat()
    return _read(path, (stamp.st_mtime_ns, stamp.st_size))


def _loaded(name: str) -> dict[str, Any]:
    path = paths.PAPERS / f"{name}.yaml"
    if name not in names():
        raise ValueError(
            f"no published values called {name!r}: known are {', '.join(names()) or 'none'}; "
            f"a new paper is a file {path.relative_to(paths.ROOT)}"
        )
    return read(path)


@functools.lru_cache(maxsize=32)
def _read(path: Path, stamp: tuple[int, int]) -> dict[str, Any]:
    # the loader in C, which most builds of PyYAML have, is ten times as fast
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def table(name: str, table_id: str) -> pd.DataFrame:
    """Gives one set of values as a frame.

    Its `.attrs` hold source, units, confidence and what it is about. Raises ValueError for an
    unknown paper or table.
    """
    import pandas as pd  # which reading the ledger, and so planning and building, does without

    tables = _loaded(name)["tables"]
    if table_id not in tables:
        raise ValueError(f"{name} has no table {table_id!r}: it has {', '.join(tables)}")
    entry = copy.deepcopy(tables[table_id])
    frame = pd.DataFrame(entry.pop("rows"), columns=entry.pop("columns"))
    if "experts" in frame:
        # integers with gaps: dense rows have no number of experts
        frame["experts"] = frame["experts"].astype("Int64")
    frame.attrs = entry
    return frame
