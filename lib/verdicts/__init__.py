"""Turns records into numbers and verdicts: intervals, claims, what routing tables say, costs.

Nothing here imports torch.
"""

# what is decided, in the order of every list: each such claim gets a line of its own
DECIDED = ("holds", "holds, smaller than published", "not reproduced", "opposite")
WORDS = (*DECIDED, "undecided", "not tested")
# a mark beside each word, so that a verdict is read without its colour
MARKS = dict(zip(WORDS, "✔◑✘⇄?–", strict=True))


def count(number: float, noun: str) -> str:
    """Says how many there are, such as "1 seed", "3 seeds" or "0.5 passes"."""
    plural = "es" if noun.endswith("s") else "s"
    shown = f"{number:g}" if isinstance(number, float) else number
    return f"{shown} {noun}{'' if number == 1 else plural}"
