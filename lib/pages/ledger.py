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

from ..verdicts import COUNTED, WORDS
from . import manifest


def page(keys: Sequence[str]) -> str:
    """Writes the generated part of the page, Markdown: counts, and a table for each notebook.

    A notebook without an answer that has claims is left out.
    """
    cells_of = {key: _cells(key) for key in keys}
    answers = {
        key: (title(cells), *answer)
        for key, cells in cells_of.items()
        if (answer := answered(cells))
    }
    counts = Counter(claim["verdict"] for *_, claims in answers.values() for claim in claims)
    words = [verdict for verdict in WORDS if verdict in COUNTED or counts[verdict]]
    listed = ", ".join(f"{counts[verdict]} *{verdict}*" for verdict in words)
    lines = [f"**{counts.total()} claims:** {listed}.", ""]
    for key, (heading, source, claims) in answers.items():
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
    """Returns what the claims of an executed notebook were tested on, and the claims.

    None without an answer that has claims.
    """
    for cell in cells:
        for output in cell.get("outputs", ()):
            data = output.get("metadata", {}).get("text/markdown", {})
            if data.get("claims"):
                return data["source"], data["claims"]
    return None


def title(cells: Sequence[dict[str, Any]]) -> str | None:
    """Returns the first heading of a notebook, or None."""
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for line in text.splitlines():
        if line.startswith("# "):
            return line.removeprefix("# ").strip()
    return None


def _cells(key: str) -> list[dict[str, Any]]:
    """Reads the cells of the executed copy; none where it is not there."""
    path = manifest.executed(key)
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def _cell(text: str) -> str:
    """Escapes a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
