"""Sentences that carry numbers: written by a cell from records, never typed into prose."""

from __future__ import annotations

from collections.abc import Iterable

from IPython.display import Markdown

from lib.claims import Verdict

__all__ = ["say", "verdicts"]


def say(*sentences: str) -> Markdown:
    """Sentences as one paragraph of the page. Pass f-strings over records; Markdown works inside."""
    return Markdown(" ".join(sentences))


def verdicts(found: Iterable[Verdict]) -> Markdown:
    """A table of claims: what was claimed, the verdict, the numbers behind it."""
    lines = ["| claim | verdict | in our records |", "| --- | --- | --- |"]
    return Markdown("\n".join([*lines, *(f"| {v.claim} | **{v.verdict}** | {v.text} |" for v in found)]))
