"""What can be played with on the pages, without a kernel or a server: by click and by keyboard.

Run by `make browser`, like `check_pages.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import views

BOOK = Path(os.environ.get("BOOK") or Path(__file__).resolve().parents[2] / "_build" / "html")
ROWS = "[...document.querySelectorAll('tr.claim')].filter(row => !row.hidden).length"
ROUTES = "notebooks/foundations/moe_layer.html"
TABLES = "notebooks/vimoe/layer_scan.html"

pytestmark = pytest.mark.skipif(
    views.CHROMIUM is None,
    reason="no Chromium here: apt-get install --no-install-recommends chromium",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert (BOOK / "index.html").is_file(), f"no book in {BOOK}: `make book` first"
    with views.chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser) -> Iterator[Any]:
    """A fresh tab, which fails the test if the page makes an error."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def told(tab: Any, box: str) -> str:
    return tab.inner_text(f"{box} >> .told")


def test_verdicts_are_filtered_by_click_and_by_key_and_the_address_says_how(tab):
    views.opened(tab, BOOK, "verdicts.html")
    every = tab.evaluate(ROWS)
    button = tab.locator("#verdict-filter button").first
    button.click()
    some = tab.evaluate(ROWS)
    assert 0 < some < every and button.get_attribute("aria-pressed") == "true"
    assert "study=" in tab.url
    tab.reload()
    assert tab.evaluate(ROWS) == some
    button.focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate(ROWS) == every
    tab.fill("#verdict-text", "no claim has these words")
    assert tab.evaluate(ROWS) == 0


def test_routes_are_explored_by_slider_and_by_arrow_keys(tab):
    views.opened(tab, BOOK, ROUTES)
    tab.focus(".routing svg >> nth=0")
    before = told(tab, ".routing >> nth=0")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    after = told(tab, ".routing >> nth=0")
    assert before.startswith("Row 1, column 1:") and after.startswith("Row 2, column 2:")
    tab.focus(".routing input >> nth=0")
    block = tab.inner_text(".routing output >> nth=0")
    tab.keyboard.press("Home")
    assert tab.inner_text(".routing output >> nth=0") != block


def test_a_table_is_taken_away_as_csv(tab):
    views.opened(tab, BOOK, TABLES)
    with tab.expect_download() as waiting:
        tab.click("a.take-away >> nth=0")
    content = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert waiting.value.suggested_filename.endswith(".csv")
    lines = content.splitlines()
    assert len(lines) > 2 and "," in lines[0]
