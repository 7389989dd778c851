"""Turns records into numbers and verdicts: intervals, claims, what routing tables say, costs.

Nothing here imports torch.
"""

COUNTED = ("holds", "does not hold", "undecided", "not tested")  # by a margin; counted if 0, too
AGAINST_PUBLISHED = (  # by the published size
    "holds",
    "holds, smaller than published",
    "not reproduced",
    "opposite",
    "undecided",
    "not tested",
)
# what is decided, in the order of every list: each such claim gets a line of its own
DECIDED = (*AGAINST_PUBLISHED[:4], "does not hold")
WORDS = (*DECIDED, "undecided", "not tested")
