"""Says at the foot of each page how it is cited: a sentence and an entry for BibTeX.

All of it is read from `CITATION.cff`, the page's title and its address; nothing is typed twice.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

SPECIAL = re.compile(r"([&%$#_{}])")  # what LaTeX reads as commands


def source(root: Path) -> dict[str, Any] | None:
    """Reads the citation file of a project; None where there is none."""
    import yaml

    file = root / "CITATION.cff"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None


def _name(author: dict[str, str]) -> str:
    """Returns a person as "family, given", and others by their name."""
    return author.get("name") or f"{author['family-names']}, {author['given-names']}"


def _bibtex_name(author: dict[str, str]) -> str:
    """Returns a name in BibTeX's form, where braces keep names together that are no person's."""
    name = _latex(_name(author))
    return f"{{{name}}}" if "name" in author else name


def sentence(cited: dict[str, Any], title: str, address: str) -> str:
    """Writes the citation of a page as text."""
    year = str(cited["date-released"])[:4]
    end = "" if title.endswith(("?", "!", ".")) else "."
    return (
        f"{'; '.join(map(_name, cited['authors']))}. “{title}{end}” In: {cited['title']}, "
        f"version {cited['version']}, {year}. Licence: {cited['license']}. {address}"
    )


def bibtex(cited: dict[str, Any], title: str, address: str) -> str:
    """Writes the entry of a page for BibTeX; an address without a host is a note."""
    note = f"Version {cited['version']}, licence: {cited['license']}"
    fields = {
        "author": " and ".join(map(_bibtex_name, cited["authors"])),
        "title": _latex(title),
        "howpublished": f"In: {_latex(cited['title'])}",
        "year": str(cited["date-released"])[:4],
        "note": note if "://" in address else f"{note}, {_latex(address)}",
    }
    if "://" in address:
        fields["url"] = address
    key = re.sub(r"\W+", "-", address.rpartition("://")[2].removesuffix(".html"))
    lines = "".join(f",\n  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{key}{lines}\n}}"


def _latex(text: str) -> str:
    return SPECIAL.sub(r"\\\1", text)


def block(cited: dict[str, Any], title: str, address: str) -> str:
    """Makes the folded block of a page; a script puts the buttons that copy into it.

    title: as HTML, with its marks. address: of the page, with a host where one is configured.
    """
    plain = " ".join(html.unescape(re.sub(r"<[^>]+>", "", title)).split())
    text, entry = (html.escape(make(cited, plain, address)) for make in (sentence, bibtex))
    return (
        '<details class="cite"><summary>Cite this page</summary>'
        f'<div class="copied-whole"><p>{text}</p></div>'
        f'<div class="copied-whole"><pre tabindex="0" aria-label="BibTeX">{entry}</pre></div>'
        "</details>\n"
    )
