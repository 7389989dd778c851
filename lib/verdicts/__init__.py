"""From records to numbers and verdicts: intervals, claims, routing tables.

Nothing here imports torch.
"""

COUNTED = ("holds", "does not hold", "undecided", "not tested")  # the order of every list
