"""The order of a page: what answers its question stands below the box, how it was found behind it.

A notebook computes in the order in which it explains, and its reader wants the figure and the table
that decide first. So the page shows the cells with these tags below the box, and a line in their
former place leads there; a heading below which nothing else stood goes. The notebook and its
executed copy keep their order: they run as they are.
"""

from __future__ import annotations

import re
from typing import Any

HEADLINES = {"headline-figure": "figure", "headline-table": "table"}  # tag -> what the cell shows
BOX_END = "your-model"  # id of the cell below which they go
LEFT = "-was"  # how the id of the line in a former place ends


def when_read(app: Any, page: str, source: list[str]) -> None:
    """Puts a notebook into the order of a page when Sphinx reads it. source: its text, replaced."""
    import nbformat

    if str(app.env.doc2path(page)).endswith(".ipynb"):
        notebook = nbformat.reads(source[0], as_version=4)
        put_headlines_first(notebook)
        source[0] = nbformat.writes(notebook)


def put_headlines_first(notebook: Any) -> None:
    """Moves the tagged cells of an executed notebook below its box, in memory.

    A label goes along where its Markdown cell has the tag, too; a code cell without output stays.
    Nothing changes where there is no box, or in a notebook that is in this order already.
    """
    ids = {cell.get("id") for cell in notebook.cells}
    if BOX_END not in ids or ids & set(HEADLINES):
        return
    first: list[Any] = []
    for tag, kind in HEADLINES.items():
        tagged = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
        if any(cell.get("outputs") for cell in tagged):
            first += [_markdown(tag, f'<div id="{tag}"></div>'), *tagged]
            line = f'The {kind} stands <a href="#{tag}">at the head of this page</a>.'
            # the last tagged cell is the code below its label
            notebook.cells.insert(notebook.cells.index(tagged[-1]), _markdown(f"{tag}{LEFT}", line))
    numbers = {id(cell) for cell in first}
    cells: list[Any] = []
    for cell in notebook.cells:
        if id(cell) not in numbers:
            cells.append(cell)
        if cell.get("id") == BOX_END:
            cells += first
    notebook.cells = _without_empty_sections(cells)


def _without_empty_sections(cells: list[Any]) -> list[Any]:
    """Leaves out headings below which nothing but lines to the head of the page is shown."""
    starts = [i for i, cell in enumerate(cells) if _is_heading(cell)]
    unwanted: set[int] = set()
    for start, end in zip(starts, [*starts[1:], len(cells)], strict=True):
        below = [cell for cell in cells[start + 1 : end] if not _shows_nothing(cell)]
        alone = "\n" not in cells[start].source.strip()
        if alone and below and all(cell["id"].endswith(LEFT) for cell in below):
            unwanted |= {id(cells[start]), *map(id, below)}
    return [cell for cell in cells if id(cell) not in unwanted]


def _is_heading(cell: Any) -> bool:
    """Tells whether a cell begins a section, with or without a label before its heading."""
    return cell.cell_type == "markdown" and bool(re.match(r"(\(.*\)=\s*)?#", cell.source))


def _shows_nothing(cell: Any) -> bool:
    return cell.cell_type == "code" and not cell.outputs


def _markdown(name: str, text: str) -> Any:
    from nbformat.v4 import new_markdown_cell

    return new_markdown_cell(text, id=name)
