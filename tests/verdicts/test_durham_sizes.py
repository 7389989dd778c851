"""Sizes of the ledger that are no difference of two printed cells: Durham's ratios of variation."""

from math import log2

import pytest

from lib.verdicts import ledger, papers


@pytest.mark.parametrize(
    ("claim", "rival"),
    [("D3a", "expert choice"), ("D3b", "token choice"), ("D3c", "priority")],
)
def test_ratios_of_the_printed_variation(claim, rival):
    variation = papers.table("durham", "strategies").set_index("model").variation
    published = ledger.claims()[claim].published
    assert published == pytest.approx(log2(variation["proposed"] / variation[rival]), abs=0.005)
