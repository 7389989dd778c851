"""The book as one document: pages in order, links inside it, places of the same name apart."""

from __future__ import annotations

import pytest

from lib.pages import contents, whole

PAGE = """<!doctype html><html><head><title>{title}</title></head><body>
<div class="sidebar" id="menu"><a href="x.html">x</a></div>
<article class="bd-article"><section id="top">
<h1><em>{title}</em> &amp; more<a href="#top">#</a></h1>
{body}<br><img src="data:image/png;base64,a" alt="a"/></section></article>
<footer>{title}</footer></body></html>
"""
FIRST = '<p><a href="notebooks/a/two.html#top">two</a> <a href="#top">up</a></p>'
SECOND = (
    '<style>#T_1 {}</style><table id="T_1" aria-labelledby="T_1 top"></table><article>x</article>'
    '<a href="../../intro.html">one</a> <a href="https://example.org/#a">site</a> '
    '<a href="../../data.csv">data</a> <svg viewBox="0 0 1 1"><path d="M0 0"/></svg> a &lt; b'
)


@pytest.fixture
def html(tmp_path):
    (tmp_path / "notebooks" / "a").mkdir(parents=True)
    (tmp_path / "intro.html").write_text(PAGE.format(title="One", body=FIRST))
    (tmp_path / "notebooks/a/two.html").write_text(PAGE.format(title="Two", body=SECOND))
    return tmp_path


def test_pages_stand_in_order_in_the_frame_of_the_first(html):
    text = whole.joined(html, {"intro": "", "notebooks/a/two": "Part & one"})
    assert text.count("<title>") == text.count("<footer>") == text.count('id="menu"') == 1
    assert text.index('<section class="page" id="intro">') < text.index('id="a-two">')
    assert '<p class="part-of-book">One &amp; more</p>' in text
    assert '<p class="part-of-book">Part &amp; one</p>' in text
    assert '<li><a href="#a-two">Two &amp; more</a></li>' in text
    assert text.rstrip().endswith("<footer>One</footer></body></html>")


def test_links_between_pages_stay_inside_and_others_stay_as_they_are(html):
    text = whole.joined(html, {"intro": "", "notebooks/a/two": ""})
    assert '<a href="#a-two--top">two</a> <a href="#intro--top">up</a>' in text
    assert '<a href="#intro">one</a> <a href="https://example.org/#a">site</a>' in text
    assert '<a href="data.csv">data</a>' in text and 'src="data:image/png;base64,a"' in text


def test_places_of_one_name_are_told_apart_and_the_rest_is_copied(html):
    text = whole.joined(html, {"intro": "", "notebooks/a/two": ""})
    assert text.count('<section id="intro--top">') == text.count('<section id="a-two--top">') == 1
    assert '<style>#T_1 {}</style><table id="T_1" aria-labelledby="T_1 a-two--top">' in text
    assert '<svg viewBox="0 0 1 1"><path d="M0 0"/></svg> a &lt; b<br><img' in text
    assert "</table><article>x</article><a" in text  # one inside is no end


def test_a_page_of_another_theme_is_refused(html):
    (html / "intro.html").write_text("<html><body><main>One</main></body></html>")
    with pytest.raises(ValueError, match="intro.html has no <article"):
        whole.joined(html, {"intro": ""})


def test_parts_are_read_from_the_table_of_contents(tmp_path):
    toc = tmp_path / "_toc.yml"
    toc.write_text(
        "format: jb-book\nroot: intro\nparts:\n  - chapters:\n      - file: read.md\n"
        "  - caption: 'A: b'\n    chapters:\n      - file: notebooks/a/two.ipynb\n"
    )
    assert contents.parts(toc) == {"intro": "", "read": "", "notebooks/a/two": "A: b"}
    toc.write_text("format: jb-book\nroot: intro\nchapters:\n  - file: status\n")
    assert contents.parts(toc) == {"intro": "", "status": ""}
