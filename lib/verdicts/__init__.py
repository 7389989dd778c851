"""Turns records into numbers and verdicts: intervals, claims, what routing tables say, costs.

Nothing here imports torch.
"""

COUNTED = ("holds", "does not hold", "undecided", "not tested")  # the order of every list
