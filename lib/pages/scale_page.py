"""The generated part of the page on the documents' scale: what each study would take.

Counting takes some seconds of a processor, so the text is made anew only where the notebooks, the
profile, the code or the measured speeds have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from ..inputs.published import DATA_SETS
from ..paths import ROOT
from . import manifest, profiles, scale
from .all_verdicts import cell

PROFILE = "paper"
FILE = ROOT / "book" / "scale_table.md"


def page(keys: Sequence[str]) -> str:
    """Writes the generated part, Markdown: the sum first, a table, data sets and readings."""
    mark = f"% made from {_digest(keys)}"
    if FILE.is_file() and (old := FILE.read_text(encoding="utf-8")).startswith(mark):
        return old
    from ..runs.estimate import DEFAULT_RATE

    # a rate: the same hours on every machine that builds the page, whatever its records say
    plan = scale.priced(scale.runs_of(keys, PROFILE), PROFILE, DEFAULT_RATE["cuda"])
    return "\n".join([mark, "", *_text(plan), ""])


def _digest(keys: Sequence[str]) -> str:
    """Hashes what the text is made from."""
    files = manifest.code_and_papers()
    table = ROOT / "notebooks" / "profiles" / f"{PROFILE}.yaml"
    sources = [manifest.source_digest(key) for key in keys]
    content = [sources, manifest.digest(table), sorted(files.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _text(plan: scale.Priced) -> list[str]:
    total = plan.total
    if not total.runs:
        return [f"No page has runs under the profile `{PROFILE}`."]
    hours = sum(total.hours.values())
    return [
        f"**{total.runs:,} runs, and {total.parents:,} that they start from, take about "
        f"{hours:,.0f} hours on one card.** They see {total.trained / 1e9:,.1f} billion training "
        f"images and take {total.macs:.1e} multiply-adds. The largest run holds about "
        f"{total.memory / scale.GIB:,.0f} GiB. Records and weights that are kept take "
        f"{total.disk / scale.GB:,.0f} GB.",
        "",
        scale.RULE,
        "",
        f"{plan.pace} The rate is assumed, nothing was measured for it.",
        "",
        *_table(plan),
        "",
        "Parents are further runs that those of a page start from; pages share them, so columns do "
        "not add up to the last row. Memory is that of the largest run, from what the committed "
        "records saved for a number; it may be off by a factor of two.",
        "",
        "## Data and weights that must be there",
        "",
        *_data_sets(plan),
        "",
        "## Where a recipe cannot be followed",
        "",
        *_readings(plan),
    ]


def _table(plan: scale.Priced) -> list[str]:
    rows = [scale.HEAD]
    for key, total in plan.pages.items():
        if total.runs:
            rows.append([f"[{key}](notebooks/{key}.ipynb)", *scale.cells(total)])
    rows.append(["**all, each run once**", *scale.cells(plan.total)])
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return [lines[0], "| --- " * len(scale.HEAD) + "|", *lines[1:]]


def _data_sets(plan: scale.Priced) -> list[str]:
    """Lists the data sets and the weights that the runs read."""
    head = ("data set", "training", "validation", "test", "source of the numbers", "to have it")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name in sorted({spec.data.name for spec in plan.runs.values()}):
        known = DATA_SETS.get(name)
        if known is None:
            lines.append(
                f"| {name} | - | - | - | no published sizes are listed | MOE_DATA/{name} |"
            )
            continue
        sizes = [
            "-" if size is None else f"{size:,}" for size in (known.train, known.val, known.test)
        ]
        lines.append(f"| {' | '.join(map(cell, (name, *sizes, known.source, known.get)))} |")
    weights = {
        f"`{spec.backbone.name}` ({spec.backbone.weights})"
        for spec in plan.runs.values()
        if spec.backbone.weights
    }
    return [
        *lines,
        "",
        "A split that a data set lacks is a fixed tenth of its training images.",
        "",
        f"Weights: {', '.join(sorted(weights))}. `timm`: those that timm's hub has by that name.",
    ]


def _readings(plan: scale.Priced) -> list[str]:
    lines = []
    for study in dict.fromkeys(key.split("/")[0] for key in plan.pages):
        sentences = profiles.readings(study, PROFILE)
        lines += [f"*{study}*", "", *(f"- {sentence}" for sentence in sentences), ""]
    return lines
