"""The built book in a real browser. Run by `make browser`, after `make book`.

The pages are opened once for all tests (`views.py`), as a reader opens them: as files, without a
server, at the width of a laptop, light and dark, and of a phone.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import views
from PIL import Image

BOOK = Path(os.environ.get("BOOK") or Path(__file__).resolve().parents[2] / "_build" / "html")
HEAVIEST = 2_000_000  # bytes of a page beside the files that all pages share
CODE = "notebooks/vimoe/layer_scan.html"  # a page with code, tables wide and narrow, and figures
FORMULAS = "notebooks/durham/strategies.html"  # a page with a formula wider than a phone
TITLE = "notebooks/leiden/why.html"  # a page whose title just fits on its line
# data sets whose pictures are grey themselves, by words of the alternative text
GREY = ("digits", "Rows of pictures", "MNIST")

pytestmark = pytest.mark.skipif(
    views.CHROMIUM is None,
    reason="no Chromium here: apt-get install --no-install-recommends chromium",
)


class Elements(HTMLParser):
    """Collects the start tags of a page with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def of(self, *tags: str) -> list[dict[str, str]]:
        """Returns the attributes of all elements of these tags."""
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.fixture(scope="session")
def elements() -> dict[str, Elements]:
    """The elements of each page."""
    assert (BOOK / "index.html").is_file(), f"no book in {BOOK}: `make book` first"
    return {page: Elements((BOOK / page).read_text(encoding="utf-8")) for page in views.pages(BOOK)}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with views.chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def seen(elements) -> list[views.View]:
    """Each page at each width, and in the dark."""
    return views.views(BOOK)


@pytest.fixture
def tab(browser) -> Iterator[Any]:
    """A fresh tab: nothing stored, the width of a laptop."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    yield context.new_page()
    context.close()


def listed(seen: list[views.View], kind: str, width: int | None = None) -> list[str]:
    """What was found of a kind, with the page, at one width or any."""
    return [
        f"{view.page} at {view.width}, {view.theme}: {line}"
        for view in seen
        if width in (None, view.width)
        for line in getattr(view, kind) or ()
    ]


def test_no_page_makes_an_error(seen):
    assert listed(seen, "errors") == []


def test_no_page_asks_another_host(seen, elements):
    assert listed(seen, "foreign") == []
    asked = [
        f"{page}: {address}"
        for page, found in elements.items()
        for attributes in found.of("script", "link", "img", "iframe", "source", "video")
        for address in (attributes.get("src", ""), attributes.get("href", ""))
        if address.startswith(("http:", "https:", "//")) and attributes.get("rel") != "canonical"
    ]
    assert asked == []


def test_tables_are_whole_at_the_width_of_a_laptop(seen):
    assert listed(seen, "clipped", 1300) == []


def test_the_last_column_of_each_table_can_be_reached_on_a_phone(seen):
    assert listed(seen, "lost", 390) == []


def test_no_page_scrolls_sideways(seen):
    assert listed(seen, "sideways") == []


def test_a_formula_wider_than_a_phone_says_that_it_scrolls(tab):
    tab.set_viewport_size({"width": 390, "height": 844})
    views.opened(tab, BOOK, FORMULAS)
    wide = """[...document.querySelectorAll("main div.math > mjx-container")].filter(
      formula => formula.scrollWidth > formula.clientWidth + 1)"""
    hints = f"{wide}.map(formula => formula.previousElementSibling?.matches('.scroll-hint'))"
    said = tab.evaluate(hints)
    assert said and all(said)


def test_a_title_takes_no_line_for_the_link_to_it(tab):
    views.opened(tab, BOOK, TITLE)
    lines = """(() => {
      const title = document.querySelector("main article h1");
      const text = document.createRange();
      text.selectNodeContents(title.firstChild);
      return [title.clientHeight, text.getBoundingClientRect().height];
    })()"""
    height, of_text = tab.evaluate(lines)
    assert height < 1.5 * of_text


def test_no_text_of_a_table_runs_over_the_next_cell(seen):
    assert listed(seen, "spilt") == []


def test_no_bar_stands_over_code(seen):
    assert [view.page for view in seen if view.bars] == []


def test_axe_has_no_serious_finding(seen):
    assert listed(seen, "findings") == []


def shown(tab: Any) -> bool:
    return tab.evaluate("document.querySelector('.cell > .cell_input').checkVisibility()")


def pressed(tab: Any) -> str:
    return tab.get_attribute(".code-switch", "aria-pressed")


def test_the_switch_shows_all_code_by_click_and_by_key(tab):
    views.opened(tab, BOOK, CODE)
    assert not shown(tab) and pressed(tab) == "false"
    tab.click(".code-switch")
    assert shown(tab) and pressed(tab) == "true"
    hidden = "[...document.querySelectorAll('.cell > .cell_input')].filter(c => !c.offsetHeight)"
    assert tab.evaluate(f"{hidden}.length") == 0
    views.opened(tab, BOOK, CODE)  # it is remembered
    assert shown(tab) and pressed(tab) == "true"
    tab.focus(".code-switch")
    tab.keyboard.press("Enter")
    assert not shown(tab) and pressed(tab) == "false"
    tab.keyboard.press("Space")
    assert shown(tab)
    assert tab.evaluate("document.activeElement.matches('.code-switch')")


def test_parameters_wrap(tab):
    views.opened(tab, BOOK, CODE)
    tab.click(".code-switch")
    wide = """[...document.querySelectorAll('.tag_parameters pre, .tag_injected-parameters pre')]
        .map(pre => pre.scrollWidth - pre.clientWidth)"""
    assert max(tab.evaluate(wide)) <= 1


def test_code_can_be_read_by_all(tab):
    for theme in views.THEMES:
        tab.emulate_media(color_scheme=theme)
        views.opened(tab, BOOK, "notebooks/vimoe/cost.html")
        if not shown(tab):
            tab.click(".code-switch")
        assert views.findings(tab) == []


def test_without_scripts_code_is_hidden_and_all_else_there(browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((BOOK / CODE).resolve().as_uri())
    assert page.locator(".cell > .cell_input").first.is_hidden()
    assert page.locator("main table").first.is_visible()
    assert page.locator(".code-switch").count() == 0
    context.close()


def test_a_wide_table_is_scrolled_by_keys(tab):
    tab.set_viewport_size({"width": 390, "height": 844})
    views.opened(tab, BOOK, CODE)
    tab.focus(".scrolls")
    for _ in range(20):
        tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.activeElement.scrollLeft > 0")
    assert tab.evaluate("document.activeElement.classList.contains('more-left')")


def test_the_switch_of_the_theme_keeps_the_focus(tab):
    views.opened(tab, BOOK, CODE)
    tab.focus(".theme-switch-button")
    before = tab.evaluate("document.documentElement.dataset.mode")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.documentElement.dataset.mode") != before
    assert tab.evaluate("document.activeElement.matches('.theme-switch-button')")


def first_found(tab, words):
    """The path of the page that a search lists first."""
    tab.goto((BOOK / "search.html").resolve().as_uri() + f"?q={words.replace(' ', '+')}")
    found = tab.wait_for_selector("#search-results li a", timeout=30_000)
    return found.get_attribute("href").partition("?")[0].partition("#")[0]


@pytest.mark.parametrize("words", ["bf16", "throughput", "glossary"])
def test_search_finds(tab, words):
    assert first_found(tab, words)


@pytest.mark.parametrize(
    "words, page",
    [
        ("upcycling", "notebooks/vimoe/layer_scan.html"),  # before the glossary, by its title
        ("my model", "notebooks/your_model/compress.html"),
    ],
)
def test_search_finds_first_the_page_that_answers(tab, words, page):
    assert first_found(tab, words) == page


def test_there_is_one_search_box(tab):
    views.opened(tab, BOOK, CODE)
    assert tab.locator(".search-button__button:visible").count() == 1


def test_links_and_anchors_lead_somewhere(elements):
    ids = {
        (BOOK / page).resolve(): {attributes.get("id") for _, attributes in found.found}
        for page, found in elements.items()
    }
    dead = []
    for page, found in elements.items():
        for attributes in found.of("a"):
            parts = urlsplit(attributes.get("href", ""))
            if parts.scheme or parts.netloc or "href" not in attributes:
                continue
            target = (BOOK / page).parent / unquote(parts.path) if parts.path else BOOK / page
            target = target.resolve()
            anchor = unquote(parts.fragment)
            place = anchor and "=" not in anchor  # else it is the state of a filter
            if not target.exists() or (place and anchor not in ids.get(target, ())):
                dead.append(f"{page}: {attributes['href']}")
    assert dead == []


def test_each_head_says_what_the_page_is(elements):
    for page, found in elements.items():
        if page in ("genindex.html", "search.html"):
            continue
        tags = {
            tag.get("name") or tag.get("property"): tag.get("content") for tag in found.of("meta")
        }
        wanted = ("description", "author", "date", "og:title", "og:description", "og:type")
        assert [name for name in wanted if not tags.get(name)] == [], page
        assert any(link.get("rel") == "icon" for link in found.of("link")), page


def test_pages_are_light():
    heavy = {page: (BOOK / page).stat().st_size for page in views.pages(BOOK)}
    assert {page: size for page, size in heavy.items() if size > HEAVIEST} == {}


# what of a page stands where, in CSS pixels from its top: box, figure at the head, first section
HEAD = """() => {
  const top = selector => {
    const found = document.querySelector(selector);
    return found && found.getBoundingClientRect().top + window.scrollY;
  };
  const box = document.querySelector('article .answer').getBoundingClientRect();
  return [box.top, box.bottom, top('#headline-figure'), top('article h2')];
}"""


def test_the_answer_is_on_the_first_screen_and_its_figure_right_below(tab, elements):
    with_figure = 0
    for page in (page for page in elements if page.startswith("notebooks/")):
        views.opened(tab, BOOK, page)
        top, bottom, figure, section = tab.evaluate(HEAD)
        assert top < views.HEIGHTS[1300] / 2 and bottom <= views.HEIGHTS[1300], page
        if figure is not None:
            with_figure += 1
            assert bottom < figure < bottom + views.HEIGHTS[1300] / 2, page
            assert figure < section, page
    assert with_figure


def test_all_verdicts_are_seen_in_six_screens(tab):
    views.opened(tab, BOOK, "verdicts.html")
    assert tab.evaluate("document.documentElement.scrollHeight") < 6 * views.HEIGHTS[1300]


def test_figures_show_something(elements):
    poor = []
    for page, found in elements.items():
        for figure in found.of("img"):
            kind, _, data = figure["src"].partition("base64,")
            if kind != "data:image/png;":
                continue
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
            pixels = pixels[::3, ::3].astype(float)
            coloured = (pixels.max(axis=2) - pixels.min(axis=2) > 30).mean()
            grey = coloured < 0.002 and not any(word in figure["alt"] for word in GREY)
            if pixels.std() < 10 or grey or not figure["alt"].strip():
                poor.append(f"{page}: {figure['alt'][:80]}")
    assert poor == []
