"""Turns records into numbers and verdicts: intervals, claims, what routing tables say, costs.

Nothing here imports torch.
"""

from collections.abc import Sequence

# what is decided, in the order of every list: each such claim gets a line of its own
DECIDED = (
    "holds",
    "holds, smaller than published",
    "holds, below what counts",
    "not reproduced",
    "opposite",
)
WORDS = (*DECIDED, "undecided", "not tested")
# a mark beside each word, so that a verdict is read without its colour
MARKS = dict(zip(WORDS, "✔◑◔✘⇄?–", strict=True))


def count(number: float, noun: str) -> str:
    """Says how many there are, such as "1 seed", "3 seeds" or "0.5 passes"."""
    plural = "es" if noun.endswith("s") else "s"
    shown = f"{number:g}" if isinstance(number, float) else number
    return f"{shown} {noun}{'' if number == 1 else plural}"


def listed(names: Sequence[str]) -> str:
    """Lists names as a sentence does: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def agree(verb: str, *numbers: int) -> str:
    """Puts a verb into the singular where a number before it is 1.

    verb: plural, such as "hold". numbers: of its subject, and of how many that is, so that both
    "1 of 12 claims" and "0 of 1 claim" hold nothing in the plural.
    """
    singular = {"are": "is", "do": "does", "have": "has"}.get(verb, f"{verb}s")
    return singular if 1 in numbers else verb
