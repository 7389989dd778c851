"""How a page is cited is read from the citation file, its title and its address."""

from __future__ import annotations

import yaml

from lib import paths
from lib.pages import cite

CITED = {
    "title": "A book",
    "authors": [{"given-names": "Ada", "family-names": "Byron"}, {"name": "The Q & A group"}],
    "version": "1.2.0",
    "date-released": "2026-01-02",
    "license": "MIT",
}


def test_a_sentence_names_authors_title_version_year_licence_and_place():
    assert cite.sentence(CITED, "How many?", "notebooks/a/how_many.html") == (
        "Byron, Ada; The Q & A group. “How many?” In: A book, version 1.2.0, 2026. "
        "Licence: MIT. notebooks/a/how_many.html"
    )
    assert "“Costs.” In" in cite.sentence(CITED, "Costs", "a.html")


def test_an_entry_for_bibtex_escapes_and_has_an_address_only_where_there_is_a_host():
    assert cite.bibtex(CITED, "100% & more", "notebooks/a/how_many.html") == (
        "@misc{notebooks-a-how_many,\n"
        "  author = {Byron, Ada and {The Q \\& A group}},\n"
        "  title = {100\\% \\& more},\n"
        "  howpublished = {In: A book},\n"
        "  year = {2026},\n"
        "  note = {Version 1.2.0, licence: MIT, notebooks/a/how\\_many.html}\n"
        "}"
    )
    hosted = cite.bibtex(CITED, "Costs", "https://example.org/a_b.html")
    assert "url = {https://example.org/a_b.html}" in hosted and "MIT}" in hosted


def test_the_block_shows_the_title_without_its_marks():
    block = cite.block(CITED, "<em>Is</em> 1 &lt; 2?", "a.html")
    assert "“Is 1 &lt; 2?”" in block and "title = {Is 1 &lt; 2?}" in block
    assert block.startswith('<details class="cite">') and " open" not in block


def test_each_value_is_that_of_the_citation_file(tmp_path):
    cited = cite.source(paths.ROOT)
    text = (paths.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert cited == yaml.safe_load(text)
    for made in (cite.sentence(cited, "T", "t.html"), cite.bibtex(cited, "T", "t.html")):
        for name in ("title", "version", "license"):
            assert str(cited[name]) in made
        assert cited["authors"][0]["name"] in made and "://" not in made
    assert cite.source(tmp_path) is None
