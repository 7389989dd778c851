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
ROUTES = ("notebooks/foundations/moe_layer.html", "notebooks/durham/decomposition.html")
TABLES = "notebooks/vimoe/layer_scan.html"
MODELS = "notebooks/moee/static_rival.html"
LINK = "article figcaption a.take-away[href^='data:text/csv']"
THIS_BUILD = "article details:has(> summary:text-matches('^this build', 'i')) >> nth=0"

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


@pytest.mark.parametrize("page", ROUTES)
def test_routes_are_explored_by_slider_and_by_arrow_keys(tab, page):
    views.opened(tab, BOOK, page)
    tab.focus(".routing svg >> nth=0")
    before = told(tab, ".routing >> nth=0")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    after = told(tab, ".routing >> nth=0")
    assert before.startswith("Patch in row 1, column 1:")
    assert after.startswith("Patch in row 2, column 2:")
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


def answer(tab: Any) -> str:
    return tab.inner_text(".pareto .answer")


def models(tab: Any) -> list[dict[str, Any]]:
    """The models that the sliders choose from."""
    return tab.eval_on_selector(".pareto", "box => JSON.parse(box.dataset.points)")


def test_models_are_chosen_by_sliders_and_keys_and_a_sentence_says_which(tab):
    views.opened(tab, BOOK, MODELS)
    losses = [model["loss"] for model in models(tab)]
    number, most = len(losses), int(tab.get_attribute(".pareto input[id$=loss]", "max"))
    for slider in ("loss", "cost"):
        tab.focus(f".pareto input[id$={slider}]")
        tab.keyboard.press("Home")  # nothing is as good as the dense model, or as cheap as nothing
        assert answer(tab).startswith(f"None of the {number} models"), slider
        before = tab.inner_text(f".pareto label[for$={slider}] output")
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text(f".pareto label[for$={slider}] output") != before
        tab.keyboard.press("End")
    fits = sum(loss <= most for loss in losses)
    assert answer(tab).startswith(f"{fits} of the {number} models")
    assert tab.locator(".pareto circle.fits").count() == fits > 0
    best = min(models(tab), key=lambda model: model["loss"])
    assert f"{best['name']}: loses " in answer(tab)


def test_measured_time_takes_the_place_of_multiply_adds_by_click_and_by_key(tab):
    views.opened(tab, BOOK, MODELS)
    timed = [model for model in models(tab) if model["time"] is not None]
    assert 0 < len(timed) < len(models(tab))
    assert f"of the {len(models(tab))} models" in answer(tab)
    tab.click(".pareto input[value=time]")
    loss, cost = (float(tab.input_value(f".pareto input[id$={name}]")) for name in ("loss", "cost"))
    fits = [model for model in timed if model["loss"] <= loss and model["time"] <= cost]
    count = len(fits) or "None"
    assert answer(tab).startswith(f"{count} of the {len(timed)} models")
    assert "of the time" in answer(tab)
    assert tab.locator(".pareto circle").count() == len(timed)
    # the plot was drawn anew, and whoever goes by keys is where they were
    tab.keyboard.press("ArrowLeft")
    assert tab.locator(".pareto circle").count() == len(models(tab))
    assert "multiply-adds" in answer(tab)


def test_models_are_chosen_by_click_and_by_drag(tab):
    views.opened(tab, BOOK, MODELS)
    for slider in ("loss", "cost"):
        part = tab.locator(f".pareto input[id$={slider}]")
        part.scroll_into_view_if_needed()
        box = part.bounding_box()
        middle, right = box["y"] + box["height"] / 2, box["x"] + box["width"] - 3
        tab.mouse.click(box["x"] + 3, middle)
        assert answer(tab).startswith("None of the"), slider
        tab.mouse.move(box["x"] + 9, middle)
        tab.mouse.down()
        tab.mouse.move(right, middle, steps=4)
        tab.mouse.up()
        assert float(part.input_value()) > 0.9 * float(part.get_attribute("max"))
    assert not answer(tab).startswith("None of the")


def test_a_model_is_named_where_one_points_and_where_the_focus_is(tab):
    views.opened(tab, BOOK, MODELS)
    circles = tab.locator(".pareto circle")
    names = [circles.nth(place).get_attribute("aria-label") for place in range(2)]
    known = tuple(f"{model['name']}: loses " for model in models(tab))
    assert all(name.startswith(known) for name in names) and names[0] != names[1]
    # clear of the header, which lies above what scrolls below it
    tab.eval_on_selector(".pareto svg", "plot => plot.scrollIntoView({block: 'center'})")
    circles.last.hover()
    assert told(tab, ".pareto") == f"{circles.last.get_attribute('aria-label')}."
    circles.first.focus()
    assert told(tab, ".pareto") == f"{names[0]}."
    tab.keyboard.press("ArrowRight")
    assert told(tab, ".pareto") == f"{names[1]}."


@pytest.mark.parametrize("page", [TABLES, MODELS])
def test_this_build_unfolds_by_keyboard(tab, page):
    views.opened(tab, BOOK, page)
    tab.focus(f"{THIS_BUILD} >> summary")
    for is_open in (True, False):
        tab.keyboard.press("Enter")
        assert tab.eval_on_selector(THIS_BUILD, "part => part.open") is is_open


def test_a_page_is_cited_by_keyboard(tab):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    views.opened(tab, BOOK, TABLES)
    tab.focus(".cite summary")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    copied = []
    for _ in range(2):  # the sentence, and after the entry itself, which scrolls, its button
        tab.wait_for_function("document.activeElement.closest('.cite')")
        if tab.evaluate("!document.activeElement.matches('button')"):
            tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        tab.wait_for_function("document.activeElement.nextSibling.textContent === 'Copied.'")
        copied.append(tab.evaluate("navigator.clipboard.readText()"))
        tab.keyboard.press("Tab")
    title = tab.inner_text("article h1").rstrip("#").strip()
    assert all(title in text and "layer" in text for text in copied), copied
    assert copied[1].startswith("@misc{") and copied[1].rstrip().endswith("}")


def test_the_numbers_of_a_figure_are_taken_away(tab):
    views.opened(tab, BOOK, TABLES)
    with tab.expect_download() as waiting:
        tab.focus(f"{LINK} >> nth=0")
        tab.keyboard.press("Enter")
    assert waiting.value.suggested_filename.endswith(".csv")
    lines = Path(waiting.value.path()).read_text(encoding="utf-8").splitlines()
    assert len(lines) > 3 and "top-1 accuracy (%)" in lines[0]


def test_a_term_leads_to_its_entry(tab):
    views.opened(tab, BOOK, TABLES)
    term = tab.locator("article a.term").first
    assert len(term.get_attribute("title")) > 20
    anchors = tab.eval_on_selector_all("article a.term", "all => all.map(one => one.hash)")
    assert len(anchors) == len(set(anchors)) > 3
    term.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/glossary.html#term-*")
    entry = tab.locator(":target")
    assert entry.is_visible() and entry.evaluate("part => part.tagName") == "DT"
    assert tab.locator("article a.term").count() == 0
