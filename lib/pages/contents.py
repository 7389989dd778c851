"""Reads the table of contents, `_toc.yml`: which pages the book has, in which order and part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..paths import ROOT
from . import parameters


def in_toc(toc: Path | None = None) -> list[str]:
    """Returns the pages that the table of contents lists, in its order, without their endings."""
    return list(parts(toc))


def parts(toc: Path | None = None) -> dict[str, str]:
    """Returns the caption of the part of each page of `in_toc`, "" without one."""
    toc = toc or ROOT / "_toc.yml"
    content = yaml.safe_load(toc.read_text(encoding="utf-8"))
    captions = dict.fromkeys(_files_of(content), "")
    for part in content.get("parts", ()):
        captions |= dict.fromkeys(_files_of(part), part.get("caption", ""))
    return captions


def in_book(toc: Path | None = None) -> list[str]:
    """Returns the keys of the notebooks that the table of contents lists, in its order."""
    files = [file for file in in_toc(toc) if file.startswith("notebooks/")]
    keys = [file.removeprefix("notebooks/") for file in files]
    for key in keys:
        if not (ROOT / "notebooks" / f"{key}.ipynb").is_file():
            raise parameters.NotebookError(
                f"_toc.yml lists notebooks/{key}, but there is no notebooks/{key}.ipynb"
            )
    return keys


def _files_of(node: Any) -> Iterator[str]:
    """Yields every `root` and `file` of a table of contents, however deep, without its ending."""
    if isinstance(node, dict):
        files = (str(value) for name, value in node.items() if name in ("root", "file"))
        yield from (file.removesuffix(".ipynb").removesuffix(".md") for file in files)
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _files_of(item)
