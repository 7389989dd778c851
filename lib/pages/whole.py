"""Joins the pages of the built book to one HTML document, to be printed as one.

Names of places (ids) get the page's name in front, so that two pages may share one, and links
between pages become links inside the document.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from html import escape
from html.parser import HTMLParser
from pathlib import Path

ARTICLE = ("article", "bd-article")  # of the theme: what of a page is its own
PLACES = re.compile(r'(?<=\s)(id|href|src|for|aria-labelledby)="([^"]*)"')
STYLED = "T_"  # ids of tables, to which their styles refer: made of their content, so no two clash
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}


def joined(folder: Path, part_of_page: Mapping[str, str]) -> str:
    """Returns one HTML document of built pages, in their order, to be read from `folder`.

    folder: of the built book. part_of_page: the caption of each page's part; pages without ending,
    such as "notebooks/vimoe/cost". Head, scripts and styles are those of the first page. Raises
    ValueError for a page that is not of the theme.
    """
    pages = list(part_of_page)
    texts = {page: (folder / f"{page}.html").read_text(encoding="utf-8") for page in pages}
    articles = {page: _Article(page, pages, text) for page, text in texts.items()}
    for page, article in articles.items():
        if not article.pieces:
            raise ValueError(f"{page}.html has no <article class={ARTICLE[1]!r}>: build it anew")
    first = texts[pages[0]]
    start = first.index(">", first.index(f'<article class="{ARTICLE[1]}')) + 1
    book = articles[pages[0]].title.strip()
    body = "\n".join(
        f'<section class="page" id="{_name(page)}">'
        f'<p class="part-of-book">{escape(part_of_page[page]) or book}</p>'  # else Chromium paints
        f"{''.join(article.pieces)}</section>"  # a heading on top twice, and so its bookmark
        for page, article in articles.items()
    )
    return first[:start] + contents(articles) + body + first[first.rindex("</article>") :]


def contents(articles: Mapping[str, _Article]) -> str:
    """Writes the list of contents, a link a page."""
    lines = "".join(
        f'<li><a href="#{_name(page)}">{article.title.strip()}</a></li>'
        for page, article in articles.items()
    )
    return f'<nav class="contents-of-book"><p><b>Contents</b></p><ol>{lines}</ol></nav>'


def _name(page: str, place: str = "") -> str:
    """Names a page, or a place on it, in the document."""
    slug = page.removeprefix("notebooks/").replace("/", "-")
    return f"{slug}--{place}" if place else slug


class _Article(HTMLParser):
    """Copies what is inside a page's article as it is written, but for names and addresses.

    pieces: of HTML; title: text of the first heading, as HTML, without the link behind it.
    """

    def __init__(self, page: str, pages: Sequence[str], text: str):
        super().__init__(convert_charrefs=False)
        self.page, self.pages = page, set(pages)
        self.pieces: list[str] = []
        self.title = ""
        self._depth = 0  # of elements, from the article on
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._depth:
            self.pieces.append(PLACES.sub(self._moved, self.get_starttag_text() or ""))
            if tag in ("h1", "a"):
                self._in_title = tag == "h1" and not self.title
            self._depth += tag not in VOID
        elif tag == ARTICLE[0] and ARTICLE[1] in (dict(attrs).get("class") or "").split():
            self._depth = 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._depth:
            self.pieces.append(PLACES.sub(self._moved, self.get_starttag_text() or ""))

    def handle_endtag(self, tag: str) -> None:
        if not self._depth:
            return
        self._in_title = self._in_title and tag != "h1"
        self._depth -= tag not in VOID
        if self._depth:
            self.pieces.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.pieces.append(data)
            self.title += data if self._in_title else ""

    def handle_entityref(self, name: str) -> None:
        self.handle_data(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self.handle_data(f"&#{name};")

    def _moved(self, found: re.Match[str]) -> str:
        """Rewrites one attribute."""
        attribute, value = found.groups()
        if attribute in ("href", "src"):
            return f'{attribute}="{self._address(value)}"'
        names = (
            part if part.startswith(STYLED) else _name(self.page, part) for part in value.split()
        )
        return f'{attribute}="{" ".join(names)}"'

    def _address(self, value: str) -> str:
        """Returns where a link of the page leads to from the document, which lies at the root."""
        if re.match(r"[a-z]+:|/", value):
            return value
        path, _, place = value.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(self.page), path))
        page = target.removesuffix(".html") if path else self.page
        if page in self.pages:
            return f"#{_name(page, place)}"
        return f"{target}#{place}" if place else target
