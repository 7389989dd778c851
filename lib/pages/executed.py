"""Reads a notebook that papermill has executed, and makes the copy of it that a reader gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import manifest

WIDGET = "application/vnd.jupyter.widget-view+json"


def footprint(notebook: Any) -> dict[str, Any]:
    """Reads what the last hidden cell printed."""
    for output in notebook.cells[-1].get("outputs", ()):
        for line in output.get("text", "").splitlines():
            if line.startswith(manifest.MARK):
                return json.loads(line.removeprefix(manifest.MARK))
    raise RuntimeError(
        "the notebook's last cell printed no footprint; does the notebook close or replace stdout?"
    )


def cleaned(part: Path, moe: dict[str, Any] | None) -> str:
    """Returns the executed notebook without hidden cells and absolute paths, with its manifest.

    moe: the manifest; None for a partial notebook, which keeps its chatter: it is the log of its
    failure.
    """
    import nbformat

    notebook = nbformat.read(part, as_version=4)
    notebook.cells = [
        cell for cell in notebook.cells if manifest.HIDDEN not in cell.metadata.get("tags", ())
    ]
    notebook.metadata.pop("papermill", None)  # holds the paths
    notebook.metadata.pop("widgets", None)  # states of progress bars: no widget lives on a page
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.metadata["tags"].append("hide-input")  # what was asked for stays at hand, folded
        if cell.get("execution_count"):  # the first hidden cell took number 1
            cell.execution_count -= 1
        for output in cell.get("outputs", ()):
            if output.get("execution_count"):
                output.execution_count -= 1
        if moe is not None and cell.cell_type == "code":
            for output in filter(_is_stderr, cell.outputs):
                print(output.text, file=sys.stderr)  # part of the log
            cell.outputs = [
                output
                for output in cell.outputs
                if not _is_stderr(output) and not _is_progress_bar(output)
            ]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)  # its figure stands in for it
    if moe is not None:
        notebook.metadata["moe"] = moe
    return nbformat.writes(notebook)


def _is_stderr(output: Any) -> bool:
    return output.output_type == "stream" and output.name == "stderr"


def _is_progress_bar(output: Any) -> bool:
    kinds = output.get("data", {})  # the widget of a figure carries HTML, too
    return WIDGET in kinds and "text/html" not in kinds
