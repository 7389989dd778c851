"""Links the first use of each term on a page to its entry in the glossary.

It works on finished HTML, so prose, generated sentences and outputs of cells are alike. Headings,
code, tables, other links and what is folded are left alone.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SKIPPED = frozenset(
    "a button code details dt h1 h2 h3 h4 h5 h6 kbd label math nav noscript option pre samp select "
    "summary svg table textarea".split()
)
SKIPPED_CLASSES = frozenset({"math", "citation", "citation-list"})
# Verbs, too: these are linked where a word before them shows that they are nouns.
ALSO_VERBS = frozenset({"load", "loads", "record", "records", "run", "runs"})
BEFORE_NOUNS = "a all each every its no of one per the these this three two".split()
# a number, but not the end of a name: "12 runs", not "bf16 runs on tiles"
AFTER_NUMBER = r"(?<=\d\s)(?<![a-z]\d\s)(?<![a-z]\d\d\s)"
# Words that mean something else without their hyphen: numbers stand in a table.
HYPHENATED = frozenset({"stand-in", "stand-ins"})


@dataclass(frozen=True)
class Term:
    """Is an entry of the glossary.

    name: as it stands there; anchor: of the entry; meaning: the definition's first sentence.
    """

    name: str
    anchor: str
    meaning: str


# ---------------------------------------------------------------- reading the glossary


@functools.cache
def glossary(env: Any) -> tuple[str, tuple[Term, ...]]:
    """Returns the page of the glossary and its terms from Sphinx's environment; "" if none."""
    from docutils import nodes

    entries = env.domaindata["std"]["objects"].items()
    pages = sorted({page for (kind, _), (page, _) in entries if kind == "term"})
    if not pages:
        return "", ()
    terms = []
    for item in env.get_doctree(pages[0]).findall(nodes.definition_list_item):
        meaning = first_sentence(item.children[-1].children[0].astext())
        for term in item.findall(nodes.term):
            if term["ids"]:
                terms.append(Term(term.astext(), term["ids"][0], meaning))
    return pages[0], tuple(terms)


def first_sentence(text: str) -> str:
    """Cuts a text after its first sentence."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0]


# ---------------------------------------------------------------- forms of a term


def forms(name: str) -> list[str]:
    """Lists how a term is written: its name, an abbreviation in brackets, both in the plural.

    A name in the plural has its singular beside it.
    """
    whole, _, short = name.partition(" (")
    written = [whole, *filter(None, [short.rstrip(")")])]
    return [*written, *map(_other_number, written)]


def _other_number(name: str) -> str:
    """Puts a name into the plural, or a plural into the singular: "mixtures of experts"."""
    parts = re.match(r"(.+?)( (?:of|for|in|and) .*)?$", name)
    noun, rest = parts[1], parts[2] or ""
    if noun.endswith(("ss", "x", "ch")):
        return f"{noun}es{rest}"
    if noun.endswith("s"):
        return f"{noun[:-1]}{rest}"
    if noun.endswith("y"):
        return f"{noun[:-1]}ies{rest}"
    return f"{noun}s{rest}"


def _pattern(form: str) -> str:
    """Writes a form as a regular expression; words that are small may begin with a capital."""
    words = []
    for word in re.split(r"[\s-]+", form):
        first = re.escape(word[0])
        if word[1:] == word[1:].lower() and word[0].islower():
            first = f"[{word[0]}{word[0].upper()}]"
        words.append(first + re.escape(word[1:]))
    pattern = ("-" if form in HYPHENATED else r"[\s-]+").join(words)
    if form in ALSO_VERBS:
        before = "|".join([AFTER_NUMBER, *(rf"(?<=\b{word}\s)" for word in BEFORE_NOUNS)])
        pattern = f"(?:{before}){pattern}"
    return pattern


def _plain(text: str) -> str:
    return re.sub(r"[\s-]+", " ", text).lower()


@functools.cache
def _finder(terms: tuple[Term, ...]) -> tuple[re.Pattern, dict[str, Term]]:
    """Makes what finds terms in a text, the longest first, and the term of each form."""
    term_of_form = {form: term for term in terms for form in forms(term.name)}
    longest_first = sorted(term_of_form, key=lambda form: (-len(form), form))
    either = "|".join(map(_pattern, longest_first))
    # whole words: no part of a longer word, a compound, a path, or a formula such as H(expert)
    pattern = re.compile(rf"(?<![\w./-])(?<!\w\()(?:{either})(?![\w-]|[./]\w)")
    return pattern, {_plain(form): term for form, term in term_of_form.items()}


# ---------------------------------------------------------------- links on a page


# A comment, a script or a style with all that is in it, or a tag: what stands between is text.
TAG = re.compile(
    r"<!--.*?-->|<(?P<raw>script|style)\b.*?</(?P=raw)\s*>"
    r"""|<(?P<end>/?)(?P<name>[a-zA-Z][\w-]*)(?P<rest>(?:"[^"]*"|'[^']*'|[^'">])*)>""",
    re.DOTALL | re.IGNORECASE,
)
CLASS = re.compile(r'\bclass\s*=\s*"([^"]*)"')
HREF = re.compile(r'\bhref\s*=\s*"([^"]*)"')


def linked(body: str, terms: Sequence[Term], address: str) -> str:
    """Returns the HTML of a page with the first use of each term linked; all else as it was.

    address: of the glossary, as seen from the page.
    """
    if not terms:
        return body
    pattern, term_of_form = _finder(tuple(terms))
    seen: set[str] = set()

    def link(match: re.Match) -> str:
        term = term_of_form[_plain(match[0])]
        if term.anchor in seen:
            return match[0]
        seen.add(term.anchor)
        meaning, target = html.escape(term.meaning), f"{address}#{term.anchor}"
        return f'<a class="term" href="{target}" title="{meaning}">{match[0]}</a>'

    copied, place = [], 0
    skipped_tag, depth = "", 0  # the element that is left alone, and how deep in its like
    for tag in TAG.finditer(body):
        text = body[place : tag.start()]
        copied += [text if depth else pattern.sub(link, text), tag[0]]
        place = tag.end()
        name = (tag["name"] or "").lower()
        if depth:
            if name == skipped_tag:
                depth += -1 if tag["end"] else 1
        elif name and not tag["end"] and _is_skipped(name, tag["rest"]):
            skipped_tag, depth = name, 1
            if name == "a" and (href := HREF.search(tag["rest"])):
                page, _, anchor = href[1].partition("#")
                seen |= {anchor} if page == address else set()  # linked by hand
    text = body[place:]
    return "".join([*copied, text if depth else pattern.sub(link, text)])


def _is_skipped(name: str, attributes: str) -> bool:
    """Tells whether an element is left alone, by its name or its class."""
    classes = CLASS.search(attributes)
    return name in SKIPPED or bool(classes and SKIPPED_CLASSES & set(classes[1].split()))
