"""Opens the pages of a built book in Chromium and notes where a reader would stumble.

    python tests/browser/views.py _build/html   # prints the counts of all pages

A view is a page at a width in a theme. A table is clipped where a part of it lies outside of the
box that cuts it off, whether or not that box can be scrolled; its last column is out of reach where
scrolling does not bring it into sight, where nothing shows that there is more, or where the
keyboard cannot scroll.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTHS = (1300, 390)  # CSS pixels: a laptop with both side bars, a phone
THEMES = ("light", "dark")
# in the dark colours change, and no box: axe at one width will do, after a switch of the theme
VIEWS = ((WIDTHS[0], "light"), (WIDTHS[0], "dark"), (WIDTHS[1], "light"))
HEIGHTS = {1300: 900, 390: 844}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# a browser asks its maker's hosts at each start, which is no matter of the page
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SETTLED = """() => {
  const formulas = window.MathJax && MathJax.startup && MathJax.startup.promise;
  const frame = () => new Promise(requestAnimationFrame);
  return Promise.resolve(formulas).then(frame).then(frame).then(() => true);
}"""
OPEN_ALL = "() => document.querySelectorAll('main details').forEach(part => { part.open = true; })"
# names of the tables that are cut off, of those whose last column stays out of reach, cells whose
# text runs over the next one, and the width of a page that scrolls to the side as a whole
TABLES = """() => {
  const cuts = box => getComputedStyle(box).overflowX !== 'visible';
  const edge = table => {
    let right = document.documentElement.clientWidth;
    for (let box = table.parentElement; box; box = box.parentElement)
      if (cuts(box)) right = Math.min(right, box.getBoundingClientRect().left + box.clientWidth);
    return right;
  };
  // boxes scroll by whole pixels, to which both sides were rounded
  const beyond = table => table.getBoundingClientRect().right > edge(table) + 2;
  const clipped = [], lost = [], spilt = [];
  const tables = [...document.querySelectorAll('main table')].filter(
    table => table.checkVisibility({visibilityProperty: true}));
  for (const table of tables) {
    const name = (table.closest('figure')?.querySelector('figcaption') ?? table).textContent;
    for (const cell of table.querySelectorAll('td, th'))
      if (!cell.querySelector('table') && cell.scrollWidth > cell.clientWidth + 1)
        spilt.push(cell.textContent.slice(0, 60));
    if (!beyond(table)) continue;
    clipped.push(name.trim().slice(0, 60));
    let box = table.parentElement;
    while (box && !cuts(box)) box = box.parentElement;
    const before = box?.previousElementSibling;
    const hint = before?.matches('.scroll-hint') ? before : null;
    const named = box?.getAttribute('role') === 'region' && box.getAttribute('aria-label');
    if (box) box.scrollLeft = box.scrollWidth;
    if (!box || beyond(table) || box.tabIndex < 0 || !named || !hint?.checkVisibility())
      lost.push(name.trim().slice(0, 60));
    if (box) box.scrollLeft = 0;
  }
  const page = document.scrollingElement;
  const sideways = page.scrollWidth > page.clientWidth ? [`${page.scrollWidth} px`] : [];
  return {count: tables.length, clipped, lost, spilt, sideways};
}"""
# what axe need not look at: further rows of a table, which are alike, and the insides of formulas
ALIKE = [["tbody tr:nth-child(n+6)"], ["mjx-container"]]
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
WITHOUT_HIDDEN_CODE = """() => document.querySelectorAll('.cell > .cell_input').forEach(
  code => code.checkVisibility() || code.remove())"""
BARS = "() => document.querySelectorAll('main details > summary .collapsed').length"


@dataclass
class View:
    """Holds what was seen of one page at one width in one theme.

    errors: of the console and uncaught ones. foreign: addresses asked for outside of the book.
    tables: how many; clipped, lost: captions of those cut off, and of those whose last column is
    out of reach. spilt: cells whose text runs over the next one. sideways: how wide a page is that
    scrolls to the side as a whole. findings: of axe, those that are
    serious or critical; None = not asked.
    """

    page: str
    width: int
    theme: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    tables: int = 0
    clipped: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    spilt: list[str] = field(default_factory=list)
    sideways: list[str] = field(default_factory=list)
    bars: int = 0
    findings: list[str] | None = None


def pages(book: Path) -> list[str]:
    """Lists the pages of a built book by their paths below it, without those that only redirect."""
    found = (path for path in book.rglob("*.html") if "_static" not in path.parts)
    return sorted(
        path.relative_to(book).as_posix()
        for path in found
        if 'http-equiv="Refresh"' not in path.read_text(encoding="utf-8")
    )


@contextmanager
def chromium() -> Iterator[Any]:
    """Starts the machine's Chromium; its downloads and settings are gone at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def opened(tab: Any, book: Path, page: str) -> None:
    """Opens a page and waits until its formulas and tables stand where they stay."""
    tab.goto((book / page).resolve().as_uri(), wait_until="load")
    tab.evaluate(SETTLED)


def looked_at(tab: Any, book: Path, page: str, width: int) -> list[View]:
    """Opens a page and notes what there is to see; at the first width by axe as well, and then in
    the dark."""
    view = View(page, width, THEMES[0])
    seen = [view]

    def on_console(message: Any) -> None:
        if message.type == "error":
            seen[-1].errors.append(message.text)

    def on_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            seen[-1].foreign.append(request.url)

    def on_error(error: Any) -> None:
        seen[-1].errors.append(str(error))

    listeners = {"console": on_console, "request": on_request, "pageerror": on_error}
    for event, listener in listeners.items():
        tab.on(event, listener)
    opened(tab, book, page)
    view.bars = tab.evaluate(BARS)
    tab.evaluate(OPEN_ALL)
    tab.evaluate(SETTLED)
    boxes = tab.evaluate(TABLES)
    view.tables = boxes["count"]
    for kind in ("clipped", "lost", "spilt", "sideways"):
        setattr(view, kind, boxes[kind])
    if width == WIDTHS[0]:
        # axe walks through all there is, and code that is hidden is half of it
        tab.evaluate(WITHOUT_HIDDEN_CODE)
        view.findings = findings(tab)
        seen.append(View(page, width, THEMES[1]))
        tab.emulate_media(color_scheme=THEMES[1])
        tab.evaluate(SETTLED)
        assert tab.evaluate("document.documentElement.dataset.theme") == THEMES[1], page
        # what is not a colour is the same in both themes
        seen[-1].findings = findings(tab, ["color-contrast"])
        tab.emulate_media(color_scheme=THEMES[0])
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    return seen


def findings(tab: Any, rules: list[str] = RULES) -> list[str]:
    """Runs axe on an open page and returns its serious findings, one line a kind."""
    from axe_playwright_python.sync_playwright import Axe

    # a colour on its way from one theme to the other is neither
    tab.evaluate(
        "Promise.allSettled(document.getAnimations().filter(move =>"
        " move.effect.getComputedTiming().endTime < Infinity).map(move => move.finished))"
    )
    options = {
        "resultTypes": ["violations"],
        "runOnly": rules,
        "preload": False,  # it would fetch styles anew, which a page opened as a file may not
    }
    found = Axe().run(tab, context={"exclude": ALIKE}, options=options).response["violations"]
    lines = []
    for kind in found:
        if kind["impact"] in ("serious", "critical"):
            first = kind["nodes"][0]
            where = " ".join(map(str, first["target"]))
            lines += [f"{kind['id']} ({len(kind['nodes'])}): {where} {first['html'][:160]}"]
    return lines


def views(book: Path) -> list[View]:
    """Looks at each page in each of `VIEWS`, in two browsers; axe at the first width."""
    found = pages(book)
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda half: _views(book, half), (found[::2], found[1::2]))
        seen = [view for half in halves for view in half]
    return sorted(seen, key=lambda view: (VIEWS.index((view.width, view.theme)), view.page))


def _views(book: Path, of: list[str]) -> list[View]:
    """Looks at some pages in a browser of their own."""
    seen = []
    with chromium() as browser:
        for width in WIDTHS:
            size = {"width": width, "height": HEIGHTS[width]}
            context = browser.new_context(viewport=size, color_scheme=THEMES[0])
            tab = context.new_page()
            for page in of:
                seen += looked_at(tab, book, page, width)
            context.close()
    return seen


def counts(seen: list[View]) -> dict[str, int]:
    """Counts what is to be none, over all views; tables and bars once, in the first theme."""
    first = [view for view in seen if view.theme == THEMES[0]]
    wide, narrow = ([view for view in first if view.width == width] for width in WIDTHS)
    return {
        "pages": len(wide),
        "views": len(seen),
        "console errors": sum(len(view.errors) for view in seen),
        "foreign requests": sum(len(view.foreign) for view in seen),
        "tables": sum(view.tables for view in wide),
        f"tables clipped at {WIDTHS[0]}": sum(len(view.clipped) for view in wide),
        f"tables clipped at {WIDTHS[1]}": sum(len(view.clipped) for view in narrow),
        f"last columns out of reach at {WIDTHS[1]}": sum(len(view.lost) for view in narrow),
        "pages that scroll sideways": sum(len(view.sideways) for view in first),
        "bars over code": sum(view.bars for view in wide),
        "serious findings of axe": sum(len(view.findings or ()) for view in seen),
    }


def main() -> None:
    """Prints the counts, and what was found how often."""
    seen = views(Path(sys.argv[1] if len(sys.argv) > 1 else "_build/html"))
    for name, number in counts(seen).items():
        print(f"{number:6}  {name}")
    for kind in ("errors", "foreign", "clipped", "lost", "spilt", "findings"):
        lines = Counter(
            f"{view.page} at {view.width} {view.theme}: {line}" if kind != "errors" else line
            for view in seen
            for line in getattr(view, kind) or ()
        )
        for line, number in lines.items():
            print(f"{kind}: {number} x {line}")


if __name__ == "__main__":
    main()
