"""Names the data behind a claim, and what they stand in for: each profile says which data set of
the document's a page uses, and which one in its place."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import paths
from ..spec.data import NAMES
from . import profiles


def shown(row: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lists the data of the runs behind a claim and its parts, stand-ins named as such.

    One record of each claim or part is looked at; none are listed where there is no record yet.
    """
    found = {}
    for one in (row, *parts):
        for run in one["records"][:1]:
            if name := _data_of(run):
                found[called(name, one["page"])] = None
    return list(found)


def called(name: str, page: str) -> str:
    """Names the data of a page's runs, and those of the document for which they stand in."""
    original = stand_ins(page.split("/")[0]).get(name, name)
    own = NAMES.get(name, name)
    return own if original == name else f"{own}, standing in for {NAMES.get(original, original)}"


def is_stand_in(name: str, page: str) -> bool:
    """Says whether the runs of a page have data of this name in place of the document's."""
    return called(name, page) != NAMES.get(name, name)


@functools.lru_cache(maxsize=4096)
def _data_of(run: str) -> str | None:
    """Reads the name of a run's data set from its committed record; None without one."""
    for file in paths.RESULTS.glob(f"*/{run}.json"):
        return json.loads(file.read_text(encoding="utf-8"))["spec"]["data"]["name"]
    return None


@functools.lru_cache(maxsize=32)
def stand_ins(study: str) -> dict[str, str]:
    """Maps data sets of the published profile of a study to those of its document, by the places
    that they have in both profiles."""
    found = {}
    for key, values in profiles.profile_table(profiles.PUBLISHED).items():
        if not key.startswith(f"{study}/") or not profiles.has_profile(key, "paper"):
            continue
        ours, theirs = (profiles.profile(key, name) for name in (profiles.PUBLISHED, "paper"))
        if ours.base_fields and theirs.base_fields:
            found[ours.base.data.name] = theirs.base.data.name
        if "stand_ins" in values:
            found |= dict(zip(ours.stand_ins, theirs.stand_ins, strict=False))
    return found
