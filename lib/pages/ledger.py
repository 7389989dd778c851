"""The page of all verdicts: what the pages' own answers say, collected from the executed notebooks.

A page's answer (`lib.report.text.answer`) carries its claims as data beside the sentence that a
reader sees. Nothing is judged here and nothing is computed, so this page cannot say anything else
than the pages do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..verdicts import COUNTED
from . import manifest


def page(keys: Sequence[str]) -> str:
    """The generated part of the page, Markdown: counts, and a table of claims for each notebook
    that has an answer."""
    found = {key: (title(cells), *told) for key in keys if (told := answered(cells := _cells(key)))}
    counts = Counter(claim["verdict"] for *_, claims in found.values() for claim in claims)
    lines = [
        f"**{counts.total()} claims:** "
        + ", ".join(f"{counts[verdict]} *{verdict}*" for verdict in COUNTED)
        + ".",
        "",
    ]
    for key, (heading, source, claims) in found.items():
        lines += [
            f"## {heading or key}",
            "",
            f"From [{key}](notebooks/{key}.ipynb): {source[0].lower() + source[1:]}.",
            "",
            "| claim | verdict | in our records |",
            "| --- " * 3 + "|",
        ]
        lines += [
            f"| {_cell(claim['claim'])} | {claim['verdict']} | {_cell(claim['text'])} |"
            for claim in claims
        ]
        lines.append("")
    return "\n".join(lines)


def answered(cells: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]] | None:
    """What the claims of an executed notebook were tested on, and the claims; None without an
    answer that has claims."""
    for cell in cells:
        for output in cell.get("outputs", ()):
            data = output.get("metadata", {}).get("text/markdown", {})
            if data.get("claims"):
                return data["source"], data["claims"]
    return None


def title(cells: Sequence[dict[str, Any]]) -> str | None:
    """The first heading of a notebook."""
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return next(
        (line.removeprefix("# ").strip() for line in text.splitlines() if line.startswith("# ")),
        None,
    )


def _cells(key: str) -> list[dict[str, Any]]:
    path = manifest.executed(key)
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
