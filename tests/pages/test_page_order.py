"""The order of a page: the figure and the table that decide stand below the box."""

from __future__ import annotations

import base64
import copy
import io
import json
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from lib.pages import contents, order, parameters

CONF = """extensions = ["myst_nb"]
nb_execution_mode = "off"
numfig = True


def setup(app):
    from lib.pages import order

    app.connect("source-read", order.when_read)
"""


def pixel() -> str:
    """The smallest picture, as a notebook holds it."""
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "png")
    return base64.b64encode(picture.getvalue()).decode()


def code(name: str, *tags: str, shows: bool = True, **metadata):
    outputs = [new_output("display_data", {"image/png": pixel()})] if shows else []
    return new_code_cell("1", id=name, outputs=outputs, metadata={"tags": list(tags), **metadata})


def executed():
    """A page as papermill leaves it: its figure has a label, its table a number of its own."""
    numbered = {"mystnb": {"figure": {"name": "figure-of-table", "caption": "Numbers."}}}
    cells = [
        new_markdown_cell("# A page\n\nSee {numref}`figure-of-table`.", id="title"),
        code("answer"),
        new_markdown_cell("What it means.", id="your-model"),
        new_markdown_cell("## Method\n\nAs [drawn](a-f1).", id="method"),
        code("table", "headline-table", **numbered),
        new_markdown_cell("## Results\n\nBy block:", id="results"),
        new_markdown_cell("(a-f1)=", id="label", metadata={"tags": ["headline-figure"]}),
        code("figure", "hide-input", "headline-figure"),
        new_markdown_cell("## Where it ends", id="end"),
    ]
    lexer = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return new_notebook(cells=cells, metadata=lexer)


def ids(notebook) -> list[str]:
    return [cell.id for cell in notebook.cells]


def test_tagged_cells_stand_below_the_box_with_a_line_in_their_place():
    notebook = executed()
    order.put_headlines_first(notebook)
    head = ["headline-figure", "label", "figure", "headline-table", "table"]
    rest = ["method", "headline-table-was", "results", "headline-figure-was", "end"]
    assert ids(notebook) == ["title", "answer", "your-model", *head, *rest]
    text = {cell.id: cell.source for cell in notebook.cells}
    assert text["headline-figure"] == '<div id="headline-figure"></div>'
    line = 'The figure stands <a href="#headline-figure">at the head of this page</a>.'
    assert text["headline-figure-was"] == line and "The table" in text["headline-table-was"]
    nbformat.validate(notebook)


def test_a_heading_goes_where_nothing_but_lines_to_the_head_is_left_below_it():
    notebook = executed()
    silent = code("silent", shows=False)
    notebook.cells[4:4] = [new_markdown_cell("## Numbers", id="numbers"), silent]
    order.put_headlines_first(notebook)
    left = ids(notebook)
    assert "numbers" not in left and "headline-table-was" not in left
    assert left.index("silent") == left.index("results") - 1  # its code can still be shown
    # below these there are sentences, or there never was anything
    assert {"method", "results", "headline-figure-was", "end"} <= set(left)


def test_a_page_in_this_order_stays_as_it_is():
    notebook = executed()
    order.put_headlines_first(notebook)
    once = copy.deepcopy(notebook)
    order.put_headlines_first(notebook)
    assert notebook == once


def test_a_cell_without_output_stays_and_a_page_without_a_box_does():
    notebook = executed()
    for cell in notebook.cells:
        if cell.id == "figure":
            cell.outputs = []
    order.put_headlines_first(notebook)
    assert ids(notebook)[3:5] == ["headline-table", "table"]
    assert ids(notebook)[-3:] == ["label", "figure", "end"]

    other = executed()
    other.cells = [cell for cell in other.cells if cell.id != "your-model"]
    before = copy.deepcopy(other)
    order.put_headlines_first(other)
    assert other == before


def test_references_resolve_and_the_notebook_on_offer_keeps_its_order(tmp_path):
    (tmp_path / "conf.py").write_text(CONF)
    nbformat.write(executed(), tmp_path / "index.ipynb")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(tmp_path), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html" / "index.html").read_text()
    assert 'href="#figure-of-table"><span class="std std-numref">Fig. 1' in page
    assert 'href="#a-f1"' in page
    anchors = ("headline-figure", "a-f1", "headline-table", "figure-of-table", "method")
    places = [page.index(f'id="{name}"') for name in anchors]
    assert places == sorted(places)
    [offered] = (tmp_path / "html" / "_sources").glob("index.ipynb*")
    assert ids(nbformat.read(offered, as_version=4)) == ids(
        executed()
    )  # what readers take away runs from its first cell on


@pytest.mark.parametrize("key", contents.in_book())
def test_every_page_says_which_figure_answers_its_question(key):
    cells = json.loads(parameters.source(key).read_text())["cells"]
    tagged = {
        tag: [c for c in cells if tag in c["metadata"].get("tags", ()) and c["cell_type"] == "code"]
        for tag in order.HEADLINES
    }
    assert len(tagged["headline-figure"]) == 1
    assert len(tagged["headline-table"]) == 1
    names = [cell["id"] for cell in cells]
    assert order.BOX_END in names
    # where it fails stands below what holds, before the method
    method = [i for i, cell in enumerate(cells) if "## Method" in "".join(cell["source"])]
    assert names.index(order.BOX_END) < names.index("limits") < min(method, default=len(cells))
