"""The status of the book: what is there, what is missing, and the command that fills it.

Both the table of `python -m lib status` and the status page are read off manifests, plans and the
record store; nothing is computed here. Only the command line's table asks the store about single
runs, so only it imports `lib.runs.collect`.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..verdicts import count
from . import coverage, manifest, missing, profiles

# -- the page of the book ------------------------------------------------------


def content_of(record: str) -> dict[str, Any]:
    """Reads the JSON of a record by its id; empty if it is absent or damaged."""
    from ..runs.store import DAMAGE, store, verified

    path = store().find(record)
    try:
        return verified(path) if path else {}
    except DAMAGE:
        return {}


def written(content: Mapping[str, Any]) -> datetime.datetime | None:
    """Returns when a record was made, as it says itself: a file's date is that of the checkout."""
    try:
        return datetime.datetime.fromisoformat(content["created"])
    except (ValueError, TypeError, KeyError):
        return None


def origin(content: Mapping[str, Any]) -> str:
    """Says where a record was computed, and in which arithmetic if not in that of its spec."""
    environment = content.get("environment", {})
    products = environment.get("products", "")
    machine = environment.get("accelerator") or environment.get("processor", "unknown processor")
    return machine + (f", products in {products}" if "rounded" in products else "")


def page(keys: Sequence[str]) -> str:
    """Writes the generated part of the status page: notebooks, machines, origins of records."""
    manifests = {key: manifest.read(key) for key in keys}
    ran = [content for content in manifests.values() if content]
    ids = dict.fromkeys(record for content in ran for record in _present(content))
    records = {record: content_of(record) for record in ids}
    machines = dict.fromkeys(_machine(content["machine"]) for content in ran)
    origins = Counter(map(origin, records.values())).most_common()
    rebuilt = [
        record
        for record, content in records.items()
        if (content.get("weights") or {}).get("parent_differs")
    ]
    return "\n".join(
        [
            "| notebook | profile | run time | threads | finished | records | oldest record |",
            "| --- " * 7 + "|",
            *(_row(key, content, records) for key, content in manifests.items()),
            "",
            "Machines and versions that ran these notebooks:",
            "",
            *(machines or ["- none yet"]),
            "",
            "Records that these pages read, by the processor that computed them:",
            "",
            *([f"- {machine}: {count}" for machine, count in origins] or ["- none yet"]),
            "",
            f"Of these records {len(rebuilt)} start from a parent that was trained again and came "
            "out with other weights than the parent's own record names, as happens on another "
            "processor.",
            "",
            "## What is not computed yet",
            "",
            *_to_compute(keys),
            "",
        ]
    )


def _to_compute(keys: Sequence[str]) -> list[str]:
    """Lists the pages whose reproduced side lacks records, and the commands that compute them."""
    rows = []
    for key in keys:
        if not profiles.has_profile(key, profiles.PUBLISHED):
            continue
        plan = profiles.plan(key, profiles.PUBLISHED)
        runs = {run.id: run for specs in plan.values() for run in specs}
        absent = [run for run in runs.values() if not coverage.has_record(run)]
        if absent:
            folder = "MOE_DATA=... " if any(run.data.in_folder for run in absent) else ""
            command = f"`{folder}{fill_command(key, profiles.PUBLISHED)}`"
            name = f"[{key}](notebooks/{key}.ipynb)"
            rows.append(f"| {name} | {len(absent)} of {len(runs)} | {command} |")
    if not rows:
        return ["All records are there that the pages ask for."]
    return [
        f"Here the runs of the profile `{profiles.PUBLISHED}` are counted; the table above counts "
        "all that a page looked for, this build's own runs among it. "
        "Pages share runs, so one command may shorten the others. `MOE_DATA` is the folder in "
        "which data sets lie. `python -m lib fill` computes first what decides most claims an "
        'hour; see <a href="reproduce.html">Reproduce at scale</a>.',
        "",
        "| page | records that are absent | command |",
        "| --- | --- | --- |",
        *rows,
    ]


def fill_command(key: str, profile: str) -> str:
    """Returns the command that computes what a page lacks under a profile."""
    return f"python -m lib run {key} --profile {profile} --records"


def _present(content: Mapping[str, Any]) -> list[str]:
    """Returns the ids of the records that a manifest lists and that were there."""
    return [record for record, digest in content["records"].items() if digest]


def _row(key: str, content: Mapping[str, Any] | None, records: Mapping[str, Any]) -> str:
    """Writes the row of a notebook. content: its manifest; records: {id: JSON of the record}."""
    if content is None:
        return f"| {key} | not run |" + "  |" * 5
    present = _present(content)
    finished = datetime.datetime.fromisoformat(content["finished"])
    cells = [
        f"[{key}](notebooks/{key}.ipynb)",
        content["profile"],
        f"{content['seconds']:.0f} s",
        str(content["machine"]["threads"]),
        f"{finished:%Y&#8209;%m&#8209;%d %H:%M&nbsp;UTC}",
        f"{len(present)} of {len(content['records'])}",
        _age((records[record] for record in present), finished),
    ]
    return f"| {' | '.join(cells)} |"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"- {machine['processor']}, {machine['cores']} cores; {versions}"


def _age(records: Iterable[Mapping[str, Any]], finished: datetime.datetime) -> str:
    """Says how old the oldest of the records was when the notebook ran."""
    oldest = min((when for content in records if (when := written(content))), default=None)
    if oldest is None:
        return "none read"
    days = max(0, (finished - oldest).days)
    before = f"{count(days, 'day')} before the run".replace(" ", "&nbsp;")
    return f"{oldest:%Y&#8209;%m&#8209;%d}, {before}"


# -- the table of the command line ---------------------------------------------


def state(key: str, profile: str) -> tuple[str, str | None]:
    """Returns fresh, stale, missing or failed, and the reason for running again."""
    why = manifest.reason_to_run(key, profile)
    if why is None:
        return "fresh", None
    if manifest.failed(key).exists():
        return "failed", f"its last run failed, see book/notebooks/{key}.failed.ipynb"
    return ("stale" if manifest.executed(key).exists() else "missing"), why


def counts(key: str, profile: str) -> Counter[str]:
    """Counts the distinct runs of a plan that are done, failed, running, missing.

    Empty for a notebook without the profile.
    """
    from ..runs import collect as runs

    if not profiles.has_profile(key, profile):
        return Counter()
    planned = {spec.id: spec for specs in profiles.plan(key, profile).values() for spec in specs}
    return Counter(runs.status_of(spec) for spec in planned.values())


def table(keys: Sequence[str], profile: str) -> str:
    """Writes the table of `python -m lib status`, with the commands that fill what is missing."""
    names = list(dict.fromkeys([profile, profiles.PUBLISHED]))
    rows = [["notebook", "state", *(f"{name} records" for name in names), "running"]]
    notes: list[str] = []
    for key in keys:
        word, why = state(key, profile)
        runs = {name: counts(key, name) for name in names}
        running = sum(count["running"] for count in runs.values())
        rows.append([key, word, *map(_share, runs.values()), str(running or "-")])
        notes += [
            f"  {key}, {name}: {fill_command(key, name)}"
            for name, count in runs.items()
            if count["missing"] or count["failed"]
        ]
        if why:
            prefix = "" if profile == "quick" else f"PROFILE={profile} "
            notes.append(f"  {key}, page: {prefix}make book ({why})")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    heading = ["", "To fill what is missing:"] if notes else []
    first = missing.head(profile, keys)
    return "\n".join([f"profile: {profile}", *lines, *heading, *notes, *first])


def _share(count: Counter[str]) -> str:
    """Says how many runs of a plan are done, and how many failed."""
    if not count:
        return "no runs"
    failed = f", {count['failed']} failed" if count["failed"] else ""
    return f"{count['done']}/{count.total()}{failed}"
