"""The page of all verdicts: what the pages' own answers say, collected from the executed notebooks.

A page's answer (`lib.report.text.answer`) carries its claims as data beside the sentence that a reader sees. Nothing is judged
here and nothing is computed, so this page cannot say anything else than the pages do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from . import manifest

COUNTED = ("holds", "does not hold", "undecided", "not tested")


def page(keys: Sequence[str]) -> str:
    """The generated part of the page, Markdown: counts, and a table of claims for each notebook that has an answer."""
    found = {key: claims for key in keys if (claims := list(claims_of(key)))}
    counts = Counter(claim["verdict"] for claims in found.values() for claim in claims)
    lines = [f"**{counts.total()} claims:** " + ", ".join(f"{counts[verdict]} *{verdict}*" for verdict in COUNTED) + ".", ""]
    for key, claims in found.items():
        lines += [f"## {title(key)}", "", f"From [{key}](notebooks/{key}.ipynb).", "", "| claim | verdict | in our records |",
                  "| --- " * 3 + "|"]
        lines += [f"| {_cell(claim['claim'])} | {claim['verdict']} | {_cell(claim['text'])} |" for claim in claims]
        lines.append("")
    return "\n".join(lines)


def claims_of(key: str) -> Iterator[dict[str, Any]]:
    """The claims that an executed notebook answers; none if it was not run."""
    for cell in _cells(key):
        for output in cell.get("outputs", ()):
            yield from output.get("metadata", {}).get("text/markdown", {}).get("claims", ())


def title(key: str) -> str:
    """The first heading of an executed notebook."""
    text = "\n".join("".join(cell["source"]) for cell in _cells(key) if cell["cell_type"] == "markdown")
    return next((line.removeprefix("# ").strip() for line in text.splitlines() if line.startswith("# ")), key)


def _cells(key: str) -> list[dict[str, Any]]:
    path = manifest.executed(key)
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
