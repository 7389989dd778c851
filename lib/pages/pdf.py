"""Prints built pages to PDF files by Chromium, without a window: each alone, or all as one book.

How a page looks on paper is said by `book/_static/print.css` and `print.js`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..paths import ROOT, written_whole
from . import build, contents, parameters, whole

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ("--headless", "--disable-gpu", "--no-pdf-header-footer")
OUTLINE = "--generate-pdf-document-outline"  # the headings, as bookmarks
SCRIPTS = 20_000  # milliseconds of its own clock that a page gets for its scripts: formulas
LIMIT = 300  # seconds for a page, on a busy machine
LIMIT_OF_BOOK = 1800


def print_pages(names: Sequence[str] = ()) -> Iterator[Path]:
    """Prints pages of the last build to `_build/pdf`, and yields each file once it is there.

    names: such as "verdicts", or "moee/routing" for a notebook; none = every page of the book.
    Raises NotebookError for a page that the book lacks, FileNotFoundError where the browser or a
    built page is missing, BuildError if the browser prints nothing.
    """
    pages = [_page(name) for name in names] or contents.in_toc()
    program, html = browser(), ROOT / "_build" / "html"
    _check_built(pages)
    for page in pages:
        target = ROOT / "_build" / "pdf" / f"{page.removeprefix('notebooks/')}.pdf"
        _print(program, html / f"{page}.html", target)
        yield target


def print_book() -> Path:
    """Prints all pages of the last build, in the order of the table of contents, to one file.

    Its bookmarks are the headings, its pages are numbered through. Raises as `print_pages` does.
    """
    pages = contents.parts()
    program, html = browser(), ROOT / "_build" / "html"
    _check_built(list(pages))
    target = ROOT / "_build" / "pdf" / "book.pdf"
    # styles and scripts are found from the folder of the pages
    source = html / f".book-{os.getpid()}.html"
    try:
        source.write_text(whole.joined(html, pages), encoding="utf-8")
        _print(program, source, target, LIMIT_OF_BOOK)
    finally:
        source.unlink(missing_ok=True)
    return target


def _check_built(pages: Sequence[str]) -> None:
    """Raises FileNotFoundError for a page that was not built."""
    for page in pages:
        source = ROOT / "_build" / "html" / f"{page}.html"
        if not source.is_file():
            raise FileNotFoundError(
                f"{build.shown(source)} is not there: build the book first (`make book`)"
            )


def browser() -> str:
    """Returns the path of a browser that prints; raises FileNotFoundError without one."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(
        f"printing needs Chromium, and none of {', '.join(BROWSERS)} is on the PATH: install it, "
        "on Debian with `apt install chromium`"
    )


def _page(name: str) -> str:
    """Returns the page of the table of contents that a user's word means."""
    pages = contents.in_toc()
    for page in (name, f"notebooks/{name}"):
        if page in pages:
            return page
    known = ", ".join(page.removeprefix("notebooks/") for page in pages)
    raise parameters.NotebookError(f"no page {name!r} in the book; it has {known}")


def _print(program: str, source: Path, target: Path, limit: int = LIMIT) -> None:
    """Prints one HTML file. The browser gets a home of its own, so that none at work is asked."""
    with tempfile.TemporaryDirectory(prefix="browser-") as home, written_whole(target) as part:
        command = [program, *OPTIONS, OUTLINE, f"--user-data-dir={home}"]
        command += [f"--virtual-time-budget={SCRIPTS}", f"--print-to-pdf={part}"]
        if os.geteuid() == 0:  # as in a container: Chromium refuses its sandbox to root
            command.append("--no-sandbox")
        done = subprocess.run(
            [*command, source.as_uri()], capture_output=True, text=True, timeout=limit
        )
        if not part.is_file() or not part.read_bytes().startswith(b"%PDF"):
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise build.BuildError(
                f"{program} did not print {build.shown(source)} (exit {done.returncode}): {said}"
            )
