"""Pages on paper: a command that prints what was built, and says what it lacks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lib.pages import contents, pdf

ROOT = Path(__file__).resolve().parents[2]
PAGE = """<!doctype html><html data-theme="dark"><head>
<link rel="stylesheet" href="{up}_static/print.css"><script src="{up}_static/print.js"></script>
</head><body><article class="bd-article"><p>Prose, <a href="{up}index.html">a page</a> and
<a href="https://example.org/">a site</a></p><table><tr>{cells}</tr></table></article></body></html>
"""


@pytest.fixture
def built(tiny):
    """The tiny book with pages that look as if they had been built."""
    html = tiny.root / "_build" / "html"
    shutil.copytree(ROOT / "book" / "_static", html / "_static")
    cells = "".join(f"<td>number{n}</td>" for n in range(60))
    for page, up in (("status", ""), ("notebooks/a/one", "../../")):
        (html / page).parent.mkdir(parents=True, exist_ok=True)
        (html / f"{page}.html").write_text(PAGE.format(up=up, cells=cells))
    return tiny


def programs(folder: Path, **scripts: str) -> str:
    """Writes shell scripts, and returns a PATH of theirs alone."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    return str(folder)


def test_pages_are_printed_where_a_browser_is(built):
    done = built.call("-m", "lib", "pdf", "status", "a/one")
    if not any(map(shutil.which, pdf.BROWSERS)):
        assert done.returncode == 2 and "`apt install chromium`" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_build/pdf/status.pdf", "_build/pdf/a/one.pdf"]
    for name in done.stdout.split():
        content = (built.root / name).read_bytes()
        assert content.count(b"/MediaBox [0 0 594.9") == 1  # one page of A4 holds the wide table
        assert b"https://example.org/" in content  # and no link leads into this machine
        assert b"file:" not in content and str(built.root).encode() not in content


def test_the_book_is_printed_as_one_with_bookmarks(built):
    built.contents("notebooks/a/one.ipynb")
    html = built.root / "_build" / "html"
    shutil.copy(html / "status.html", html / "intro.html")
    for page in ("intro.html", "notebooks/a/one.html"):
        title = f'class="bd-article"><h1>Title of {page}</h1>'
        text = (html / page).read_text().replace('class="bd-article">', title)
        (html / page).write_text(text)
    done = built.call("-m", "lib", "pdf", "--book")
    if not any(map(shutil.which, pdf.BROWSERS)):
        assert done.returncode == 2 and "`apt install chromium`" in done.stderr
        return
    assert (done.returncode, done.stdout) == (0, "_build/pdf/book.pdf\n"), done.stderr
    content = (built.root / "_build/pdf/book.pdf").read_bytes()
    assert content.count(b"/MediaBox [0 0 594.9") == 3  # the contents, and a sheet for each page
    assert b"/Outlines" in content and b"(Title of notebooks/a/one.html)" in content
    assert b"file:" not in content and not list(html.glob(".book*"))


ON_PAPER = """<script>addEventListener("load", () => {
  dispatchEvent(new Event("beforeprint"));
  const folds = [...document.querySelectorAll("details")];
  const shown = () => folds.map(fold => (fold.open ? "open" : "") + fold.className).join(",");
  document.title = [
    document.querySelector("table").getBoundingClientRect().width <= 680,
    shown(),
    document.links.length,
    document.documentElement.dataset.theme,
  ].join(" ");
  dispatchEvent(new Event("afterprint"));
  document.title += ` ${shown()} ${document.links.length}`;
  document.title += ` ${document.documentElement.dataset.theme}`;
});</script><details><summary>Folded</summary></details>
<details><summary>this build</summary></details>
<details><summary>
What this build ran on</summary></details>
<details open><summary>This build: opened by hand</summary></details>"""


def test_a_page_is_made_ready_for_paper_and_put_back(built):
    """A wide table fits, what is folded is open but for this build's, links into this machine are
    none, all is light."""
    if not any(map(shutil.which, pdf.BROWSERS)):
        with pytest.raises(FileNotFoundError, match="apt install chromium"):
            pdf.browser()
        return
    page = built.root / "_build" / "html" / "status.html"
    page.write_text(page.read_text().replace("<table>", f"{ON_PAPER}<table>"))
    command = [pdf.browser(), "--headless", "--disable-gpu", "--no-sandbox", "--dump-dom"]
    command += [f"--user-data-dir={built.root / 'home'}", "--virtual-time-budget=10000"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True)
    assert "<title>true open,noprint,noprint,open 1 light ,,,open 2 dark</title>" in done.stdout


def test_without_a_browser_it_says_how_to_get_one(built, tmp_path):
    done = built.call("-m", "lib", "pdf", PATH=programs(tmp_path / "none"))
    assert done.returncode == 2
    assert "printing needs Chromium, and none of chromium, " in done.stderr
    assert "on Debian with `apt install chromium`" in done.stderr


def test_pages_that_are_not_there_are_named(built, tmp_path):
    path = programs(tmp_path / "bin", chromium="exit 0\n")
    done = built.call("-m", "lib", "pdf", "a/three", PATH=path)
    assert done.returncode == 2
    assert "no page 'a/three' in the book; it has intro, a/one, a/two, status," in done.stderr
    done = built.call("-m", "lib", "pdf", "status", "a/two", PATH=path)
    assert done.returncode == 2
    assert "_build/html/notebooks/a/two.html is not there: build the book first" in done.stderr
    assert not (built.root / "_build" / "pdf").exists()


def test_a_browser_that_prints_nothing_is_an_error(built, tmp_path):
    path = programs(tmp_path / "bin", chromium="echo no display >&2\nexit 3\n")
    done = built.call("-m", "lib", "pdf", "status", PATH=path)
    assert done.returncode == 1
    assert "did not print _build/html/status.html (exit 3): no display" in done.stderr
    assert not list((built.root / "_build" / "pdf").glob("*"))


def test_pages_are_those_of_the_table_of_contents(tiny):
    tiny.contents("notebooks/a/one.ipynb", "status.md", "verdicts")
    pages = ["intro", "notebooks/a/one", "status", "verdicts"]
    assert contents.in_toc(tiny.root / "_toc.yml") == pages
