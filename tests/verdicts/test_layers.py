"""Numbers of layers: which ones are averaged, and over what."""

from operator import itemgetter
from types import SimpleNamespace

import numpy as np
import pytest

from lib.verdicts.layers import (
    blocks_that_part,
    cluster_agreement,
    half_means,
    last_less_early,
    late_less_early,
    layer_intervals,
    layer_mean,
    pair_mean,
    sorted_loads,
)
from lib.verdicts.stats import mean_interval

NOISE = itemgetter("noise")


def layers(*values):
    return [{"noise": value} for value in values]


def test_mean_is_over_the_layers_that_have_the_number():
    assert layer_mean(layers(1.0, None, 4.0), NOISE) == 2.5
    assert layer_mean(layers(0.0, None), NOISE) == 0.0  # zero is a number
    assert layer_mean(layers(None, None), NOISE) is None
    assert layer_mean([], NOISE) is None


def test_halves_leave_out_the_middle_and_what_is_not_there():
    assert half_means([1.0, 3.0, 99.0, None, 6.0]) == (2.0, 6.0)
    assert late_less_early([1.0, 3.0, 99.0, None, 6.0]) == 4.0
    assert half_means(iter([None, 2.0, 5.0, 7.0])) == (2.0, 6.0)
    assert half_means([None, 1.0]) == (None, 1.0) and late_less_early([None, 1.0]) is None
    assert half_means([1.0]) == half_means([]) == (None, None)


def test_each_layer_has_its_own_interval_over_seeds():
    seeds = [layers(1.0, 10.0, None), layers(2.0, None, None), layers(6.0, 20.0, None)]
    first, second, third = layer_intervals(seeds, NOISE)
    assert first == mean_interval([1.0, 2.0, 6.0])
    assert second == mean_interval([10.0, 20.0]) and second.n == 2
    assert third is None
    assert layer_intervals([], NOISE) == []


def test_records_with_different_numbers_of_layers_are_refused():
    with pytest.raises(ValueError):
        layer_intervals([layers(1.0, 2.0), layers(1.0)], NOISE)


def test_pairs_leave_out_the_diagonal():
    assert pair_mean([[1.0, 0.2, 0.3], [0.2, 1.0, 0.7], [0.3, 0.7, 1.0]]) == pytest.approx(0.4)
    assert pair_mean([[5.0, -1.0], [-1.0, 5.0]]) == -1.0
    assert pair_mean([[1.0]]) is None
    assert pair_mean([]) is None


def test_the_last_layer_against_the_early_half():
    assert last_less_early([1.0, 3.0, 100.0, 4.0, 8.0]) == 6.0  # 8 less 2
    assert last_less_early([5.0, 2.0]) == late_less_early([5.0, 2.0]) == -3.0
    assert last_less_early([]) is None and last_less_early([None, 2.0]) is None
    assert last_less_early([2.0, 5.0, None]) is None


def test_a_block_parts_patches_if_no_expert_gets_nearly_all():
    # two MoE layers of places by expert; place 0 is the class token, which does not count
    parts = [[0, 100], [94, 6], [94, 6]]
    does_not = [[0, 1000], [95, 5], [96, 4]]
    record = SimpleNamespace(
        moe=[{"block": 2}, {"block": 5}], arrays={"position_expert": np.array([parts, does_not])}
    )
    assert blocks_that_part(record) == {2}
    assert blocks_that_part(SimpleNamespace(moe=[], arrays={})) == set()


def test_agreement_counts_a_half_without_clusters_as_none():
    def layer(stability, *load):
        return {"clusters": len(load), "load": list(load), "stability": stability}

    assert cluster_agreement(layer(0.7, 0.5, 0.5)) == 0.7
    assert cluster_agreement(layer(None, 0.5, 0.5)) == 0.0  # a half had fewer than two clusters
    assert cluster_agreement(layer(1.0, 0.94, 0.06)) is None  # class token against patches
    assert cluster_agreement(layer(None, 1.0)) == 0.0  # it stayed dense
    rows = [layer(0.8, 0.5, 0.5), layer(None, 0.6, 0.4), layer(1.0, 0.06, 0.94)]
    assert layer_mean(rows, cluster_agreement) == pytest.approx(0.4)


def test_sorted_loads_are_means_over_the_seeds_whose_block_routes():
    def run(**load_of_block):
        layers = [{"block": int(name[1:]), "load": load} for name, load in load_of_block.items()]
        return SimpleNamespace(moe=layers)

    # 1.5 and 0.5 of an even load; then 2, 0.8 and 0.2 of it, of which four points read 1, 2, 2, 3
    runs = [run(b0=[0.25, 0.75]), run(b0=[0.2 / 3, 2 / 3, 0.8 / 3], b3=[1.0, 0.0]), run()]
    assert [value.mean for value in sorted_loads(runs, 0, 4)] == pytest.approx(
        [(1.5 + 2) / 2, (1.5 + 0.8) / 2, (0.5 + 0.8) / 2, (0.5 + 0.2) / 2]
    )
    assert [value.n for value in sorted_loads(runs, 0, 4)] == [2] * 4
    assert [value.mean for value in sorted_loads(runs, 3, 2)] == [2.0, 0.0]
    assert sorted_loads(runs, 7, 4) == []
