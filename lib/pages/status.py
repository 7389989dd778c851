"""What is there and what is missing: the table of `python -m lib status` and the status page of the
book.

Both are read off manifests, plans and the record store; nothing is computed here. Only the command
line's table asks the store about single runs, so only it imports `lib.runs.collect`.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from . import manifest, profiles

PUBLISHED = "small"  # the profile whose records are committed


def told(record: str) -> dict[str, Any]:
    """The JSON of a record, empty if it cannot be read."""
    from ..runs.store import store

    path = store().find(record)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}


def written(content: dict[str, Any]) -> datetime.datetime | None:
    """When a record was made, as the record itself says: a file's own date is that of the checkout."""
    try:
        return datetime.datetime.fromisoformat(content["created"])
    except (ValueError, KeyError):
        return None


def origin(content: dict[str, Any]) -> str:
    """Where a record was computed, and in which arithmetic if not in that of its spec."""
    made = content.get("environment", {})
    products = made.get("products", "")
    where = made.get("accelerator") or made.get("processor", "unknown processor")
    return where + (f", products in {products}" if "rounded" in products else "")


def page(keys: Sequence[str]) -> str:
    """The generated part of the status page: run time, threads, dates, records of each notebook;
    machines, versions."""
    rows = [
        "| notebook | profile | run time | threads | finished | records | oldest record |",
        "| --- " * 7 + "|",
    ]
    machines: dict[str, None] = {}
    records: dict[str, dict[str, Any]] = {}
    for key in keys:
        found = manifest.read(key)
        if found is None:
            rows.append(f"| {key} | not run |" + "  |" * 5)
            continue
        present = [record for record, value in found["records"].items() if value]
        records |= {record: told(record) for record in present if record not in records}
        finished = datetime.datetime.fromisoformat(found["finished"])
        rows.append(
            f"| [{key}](notebooks/{key}.ipynb) | {found['profile']} | {found['seconds']:.0f} s | "
            f"{found['machine']['threads']} | {finished:%Y-%m-%d&nbsp;%H:%M&nbsp;UTC} | "
            f"{len(present)} of {len(found['records'])} | {_age(map(records.get, present), finished)} |"
        )
        versions = ", ".join(
            f"{name} {version}" for name, version in found["machine"]["versions"].items()
        )
        machines[
            f"- {found['machine']['processor']}, {found['machine']['cores']} cores; {versions}"
        ] = None
    origins = [
        f"- {name}: {count}" for name, count in Counter(map(origin, records.values())).most_common()
    ]
    rebuilt = sum(
        bool((content.get("weights") or {}).get("parent_differs")) for content in records.values()
    )
    return "\n".join(
        [
            *rows,
            "",
            "Machines and versions that ran these notebooks:",
            "",
            *(machines or ["- none yet"]),
            "",
            "Records that these pages read, by the processor that computed them:",
            "",
            *(origins or ["- none yet"]),
            "",
            f"Of them {rebuilt} start from a parent that was trained again and came out with other weights than those "
            "of the parent's own record, as it does on another processor.",
            "",
        ]
    )


def _age(present: Iterable[dict[str, Any]], finished: datetime.datetime) -> str:
    oldest = min((when for content in present if (when := written(content))), default=None)
    if oldest is None:
        return "none read"
    days = max(0, (finished - oldest).days)
    return f"{oldest:%Y-%m-%d}, {days} day{'s' * (days != 1)} before the run".replace(" ", "&nbsp;")


def state(key: str, profile: str) -> tuple[str, str | None]:
    """fresh, stale, missing or failed, and the reason for running again."""
    why = manifest.reason_to_run(key, profile)
    if why is None:
        return "fresh", None
    if manifest.failed(key).exists():
        return "failed", f"its last run failed, see book/notebooks/{key}.failed.ipynb"
    return ("missing" if not manifest.executed(key).exists() else "stale"), why


def counts(key: str, profile: str) -> Counter[str]:
    """How many distinct runs of a plan are done, failed, running, missing. Empty for a notebook
    without the profile."""
    from ..runs import collect as runs

    if not profiles.has_profile(key, profile):
        return Counter()
    planned = {spec.id: spec for specs in profiles.plan(key, profile).values() for spec in specs}
    return Counter(runs.status_of(spec) for spec in planned.values())


def table(keys: Sequence[str], profile: str) -> str:
    """The table of `python -m lib status`, with the commands that fill what is missing."""
    profiles = list(dict.fromkeys([profile, PUBLISHED]))
    rows = [["notebook", "state", *(f"{name} records" for name in profiles), "running"]]
    notes: list[str] = []
    for key in keys:
        now, why = state(key, profile)
        row, running = [key, now], 0
        for name in profiles:
            found = counts(key, name)
            running += found["running"]
            failed = f", {found['failed']} failed" if found["failed"] else ""
            row.append(f"{found['done']}/{found.total()}{failed}" if found else "no runs")
            if found["missing"] or found["failed"]:
                notes.append(f"  {key}, {name}: python -m lib run {key} --profile {name} --records")
        rows.append([*row, str(running) if running else "-"])
        if why:
            notes.append(
                f"  {key}, page: {'PROFILE=' + profile + ' ' if profile != 'quick' else ''}make book ({why})"
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            f"profile: {profile}",
            *lines,
            *(["", "To fill what is missing:", *notes] if notes else []),
        ]
    )
