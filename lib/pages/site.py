"""The pages in a browser: what Sphinx and its theme are told so that nothing stands in the way.

A Sphinx extension beside `lib.pages.build`. It takes the bars off the cells of code (the script
`book/_static/book.js` shows all code or none), shows the figure and the table that decide first
(`lib.pages.order`), leaves out scripts that ask other hosts, and writes what search engines and
link previews read in the head of a page.
"""

from __future__ import annotations

import functools
import html
import json
from pathlib import Path
from typing import Any

from . import cite, manifest, order, terms

SCRIPT = "book.js"
DESCRIPTION = 200  # characters of a page's first paragraph, as search engines show
# Of the theme: no bar with a second search box, no place for advertisements.
OPTIONS = {"navbar_persistent": [], "primary_sidebar_end": []}
FOREIGN = ("https:", "http:", "//")
# It runs cells on another host; Jupyter Book loads its extension whatever one asks for.
THEBE = "thebe"
# Sphinx calls a bibliography a list, whose entries it does not call items of one
LIST, NO_LIST = '<div role="list" class="citation-list">', '<div class="citation-list">'

# What readers type into the search box, where a page answers it in other words: single words.
KEYWORDS = {
    "how_to_read": "glossary, terms, notation",
    "notebooks/foundations/speed": "bf16, throughput, latency, speedup",
    "notebooks/your_model/compress": "my, own, throughput, speedup",
    "notebooks/your_model/models": "my, own, supported",
    "own_data": "my, dataset",
}


def _configure(app: Any, config: Any) -> None:
    """Sets the theme's options, whichever program made the configuration."""
    config.html_theme_options = {**config.html_theme_options, **OPTIONS}
    config.html_context = {"default_mode": "auto", **config.html_context}


def _unfold(app: Any, doctree: Any) -> None:
    """Takes the bars off inputs of cells; hidden outputs keep theirs."""
    from docutils import nodes

    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code" and cell.get("hide_mode") == "input":
            del cell["hide_mode"]
        elif cell.get("nb_element") == "cell_code" and cell.get("hide_mode") == "input+output":
            cell["hide_mode"] = "output"


def _add_keywords(app: Any, doctree: Any) -> None:
    """Puts the words that readers search for into the head and the index of the search."""
    from docutils import nodes

    words = KEYWORDS.get(app.env.docname)
    if words:
        doctree.append(nodes.meta(name="keywords", content=words))


def _head(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Leaves out foreign and repeated scripts and adds the page's description."""
    if "body" in context:
        context["body"] = context["body"].replace(LIST, NO_LIST)
    for kind in ("script_files", "css_files"):
        context[kind] = _wanted(context.get(kind, ()))
    if doctree is not None:
        tags = _tags(app.config.html_title, app.config.author, page, context["title"], doctree)
        context["metatags"] = context.get("metatags", "") + tags
        context["body"] = _finished_body(app.env, page, context)


def _finished_body(env: Any, page: str, context: dict[str, Any]) -> str:
    """Links terms to the glossary and says at the page's foot how it is cited."""
    body = context["body"]
    entries, words = terms.glossary(env)
    if page != entries:
        body = terms.linked(body, words, context["pathto"](entries) if words else "")
    if cited := cite.source(Path(manifest.ROOT)):
        body += cite.block(cited, context["title"], context.get("pageurl") or f"{page}.html")
    return body


def _wanted(files: Any) -> list[Any]:
    """Keeps the first of equal scripts or styles, and none that is unwanted."""
    kept: dict[str, Any] = {}
    for file in files:
        name = str(getattr(file, "filename", file) or "")
        body = getattr(file, "attributes", {}).get("body") or ""
        if not name.startswith(FOREIGN) and THEBE not in f"{name}{body}".lower():
            kept.setdefault(f"{name}{body}", file)
    return list(kept.values())


def _tags(book: str, author: str, page: str, title: str, doctree: Any) -> str:
    """Writes the meta elements of a page: description, author, date and a link's preview."""
    described = description(doctree)
    lines = [
        ("name", "description", described),
        ("name", "author", author or f"The authors of {book}"),
        ("property", "og:title", title),
        ("property", "og:description", described),
        ("property", "og:type", "article"),
        ("property", "og:site_name", book),
        ("name", "date", _date(page)),
    ]
    return "".join(
        f'<meta {key}="{name}" content="{html.escape(content)}" />\n'
        for key, name, content in lines
        if content
    )


def description(doctree: Any) -> str:
    """Returns the beginning of a page's first paragraph, cut after a word."""
    from docutils import nodes

    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split()).removeprefix("Question. ")
        if len(text) > DESCRIPTION:
            text = text[:DESCRIPTION].rpartition(" ")[0] + " …"
        if text:
            return text
    return ""


def _date(page: str) -> str:
    """Returns the day on which a page's notebook ran; of other pages, the last such day."""
    folder = Path(manifest.ROOT) / "book" / "notebooks"
    one = folder / f"{page.removeprefix('notebooks/')}.ipynb"
    files = [one] if one.is_file() else folder.rglob("[!.]*.ipynb")
    return max((_finished(file) for file in files), default="")[:10]


@functools.cache
def _finished(file: Path) -> str:
    moe = json.loads(file.read_text(encoding="utf-8"))["metadata"].get("moe") or {}
    return moe.get("finished", "")


def setup(app: Any) -> dict[str, bool]:
    """Registers the hooks with Sphinx; the last of the pages' hooks, to see what others added."""
    app.add_js_file(SCRIPT, priority=100)  # before the theme looks for what reaches into the margin
    app.connect("config-inited", _configure)
    app.connect("source-read", order.when_read)
    app.connect("doctree-read", _unfold)
    app.connect("doctree-read", _add_keywords)
    app.connect("html-page-context", _head, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
