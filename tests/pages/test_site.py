"""What a browser gets: no bars over code, no foreign scripts, no widgets that cannot live."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

from docutils import nodes
from docutils.frontend import get_default_settings
from docutils.parsers.rst import Parser
from docutils.utils import new_document

from lib import paths
from lib.pages import site

WIDGET = """import ipywidgets
from IPython.display import display
display(ipywidgets.IntProgress(value=3))
print("after the bar")"""


def test_a_page_has_neither_bars_nor_foreign_scripts_nor_states_of_widgets(tiny):
    path = tiny.notebook("a/one", WIDGET)
    content = json.loads(path.read_text())
    content["cells"][-1]["metadata"]["tags"] = ["hide-input"]
    path.write_text(json.dumps(content))
    shutil.copy(paths.ROOT / "CITATION.cff", tiny.root)
    entry = "gate\n  A number, with *weight*. It is more.\n\n  And more."
    (tiny.root / "book" / "glossary.md").write_text(f"# Terms\n\n```{{glossary}}\n{entry}\n```\n")
    (tiny.root / "book" / "intro.md").write_text("# Tiny\n\nA book of *gates*.\n")
    tiny.contents("notebooks/a/one", "glossary", "status", "verdicts", "coverage", "how_to_read")
    done = tiny.build(PROFILE="smoke")
    assert done.returncode == 0, done.stderr

    copy = tiny.executed("a/one")
    assert "widgets" not in copy["metadata"] and "after the bar" in json.dumps(copy["cells"])
    html = tiny.root / "_build" / "html"
    page = (html / "notebooks" / "a" / "one.html").read_text()
    assert "after the bar" in page and "tag_hide-input" in page
    for unwanted in ("Show code cell", "THEBE_JS_URL", "cdnjs", "widget-state", "ethical-ad"):
        assert unwanted not in page, unwanted
    assert page.count("_static/book.js") == 1 and "_static/book.css" in page
    assert '<meta property="og:title" content="Notebook a/one" />' in page
    assert '<meta name="description" content="A book' in (html / "intro.html").read_text()
    link = '<a class="term" href="glossary.html#term-gate" title="A number, with weight.">gates</a>'
    intro, glossary = ((html / f"{name}.html").read_text() for name in ("intro", "glossary"))
    assert f"<p>A book of <em>{link}</em>.</p>" in intro and 'class="term"' not in glossary
    assert 'id="term-gate"' in glossary
    assert "In: Mixture of Experts" in page and "notebooks/a/one.html</p>" in page
    day = copy["metadata"]["moe"]["finished"][:10]
    assert f'<meta name="date" content="{day}" />' in page
    assert (html / "_static" / "favicon.svg").is_file()


def test_of_equal_scripts_the_first_stays_and_foreign_ones_go():
    def script(name: str | None, body: str = "") -> SimpleNamespace:
        return SimpleNamespace(filename=name, attributes={"body": body} if body else {})

    first, inline = script("a.js"), script(None, "let b = 1;")
    files = [
        first,
        inline,
        script("a.js"),
        script(None, "let b = 1;"),
        script("https://cdn.example/c.js"),
        script(None, 'const THEBE_JS_URL = "x"'),
        "plain.js",
    ]
    assert site._wanted(files) == [first, inline, "plain.js"]


def test_words_of_the_search_are_single_and_of_pages_that_are_there():
    for page, words in site.KEYWORDS.items():
        folder = paths.ROOT if page.startswith("notebooks/") else paths.ROOT / "book"
        assert any((folder / f"{page}{end}").is_file() for end in (".ipynb", ".md")), page
        assert all(word.strip().isalnum() for word in words.split(",")), words


def document(text: str) -> nodes.document:
    made = new_document("page", get_default_settings(Parser))
    Parser().parse(text, made)
    return made


def test_the_description_is_the_first_paragraph_cut_after_a_word():
    assert site.description(document("Title\n=====\n\n**Question.** Who?\n\nMore.")) == "Who?"
    long = site.description(document("word " * 100))
    assert len(long) <= site.DESCRIPTION + 2 and long.endswith("word …")
    assert site.description(document("")) == ""
