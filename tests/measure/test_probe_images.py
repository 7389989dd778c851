"""Which test images a record keeps the routes and heat maps of."""

from __future__ import annotations

import pytest
import torch

from lib.measure.probes import pairs_of_a_class
from lib.spec import MoESpec, RunSpec


@pytest.mark.parametrize(
    ("labels", "pairs", "places"),
    [
        # spread: 0, 3, 6; each with the next of its class, the last with the first
        ([2, 5, 2, 0, 5, 0, 2], 3, [0, 2, 3, 5, 6]),
        ([0, 1, 1, 0], 2, [0, 3]),  # a pair of which both were spread comes once
        ([0, 1, 2], 2, [0, 2]),  # classes of one image
        ([4, 4], 6, [0, 1]),  # fewer images than places
    ],
)
def test_pairs_by_hand(labels, pairs, places):
    assert pairs_of_a_class(torch.tensor(labels), pairs).tolist() == places


def test_pairs_of_a_run_without_pictures_are_refused():
    with pytest.raises(ValueError, match="this run keeps neither: set moe .* or leave it False"):
        RunSpec(probe_pairs=True)
    assert RunSpec(probe_pairs=True, cam_probe=True).id != RunSpec(cam_probe=True).id
    assert RunSpec(probe_pairs=True, moe=MoESpec(layers=1, experts=2)).probe_pairs
