"""Evidence of test top-1 from the arms that the ledger names, for all claims of a page at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .evidence import Evidence, compare
from .ledger import TOP1, judged_on


def compare_arms(page: str, records_of_arm: Mapping[str, Sequence[Any]]) -> Iterator[Evidence]:
    """Compares the first arm with the second, for each claim of a page that judges test top-1.

    page: key of the notebook. records_of_arm: such as one side of the page; a claim of which an
    arm is not there is left out, since a small build plans few of them.
    """
    for claim in judged_on(page):
        arms = claim.arms
        if claim.statistic == TOP1 and len(arms) == 2 and set(arms) <= records_of_arm.keys():
            yield compare(claim.id, *(records_of_arm[arm] for arm in arms))
