"""Names of layers that a caller gives as patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Tells whether a pattern names a module or one that it lies in: "blocks.0" is all of block 0.

    `*` stands for any letters, dots included, `?` for one, `[ab]` for one of some.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def matching(names: Iterable[str], patterns: Sequence[str], argument: str) -> list[str]:
    """Lists those of `names` that one of the patterns names, in their order.

    Raises ValueError for a string in the place of the list of patterns, and for a pattern that
    names none. argument: what the caller calls the patterns.
    """
    names = list(names)
    if isinstance(patterns, str):
        raise ValueError(f"{argument}={patterns!r} is one text: give a list, [{patterns!r}]")
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"{argument}: {pattern!r} fits none of the layers {', '.join(names) or '(none)'}"
            )
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]
