"""What masks of experts show, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.verdicts.masks import (
    cohesion,
    differ_by_label,
    first_choices,
    probe_labels,
    probes_of_classes,
)


def test_first_choices_leave_the_class_token_out():
    experts = np.array([[[9, 0, 1, 2, 3]], [[9, 4, 5, 6, 7]]])  # (layers, images, tokens)
    record = SimpleNamespace(arrays={"token_expert": experts})
    assert first_choices(record, -1).tolist() == [[[4, 5], [6, 7]]]


def test_halves_hang_together():
    halves = np.array([[[0, 0], [1, 1]]])
    # 2 of 4 neighbours; of 6 pairs the same 2 share an expert
    assert cohesion(halves) == pytest.approx(2 / 4 - 2 / 6)


def test_a_checkerboard_is_less_than_random():
    board = np.array([[[0, 1], [1, 0]]])
    assert cohesion(board) == pytest.approx(0 - 2 / 6)
    assert cohesion(np.array([[[0, 0], [1, 1]], [[0, 1], [1, 0]]])) == pytest.approx(1 / 4 - 1 / 3)


def test_one_expert_for_all_says_nothing():
    assert cohesion(np.zeros((3, 4, 4), int)) == 0


def test_cohesion_of_shuffled_masks_is_zero_on_average():
    draw = np.random.default_rng(0)
    halves = np.repeat([0, 1], 8)
    shuffled = [draw.permutation(halves).reshape(4, 4) for _ in range(4000)]
    assert cohesion(np.array(shuffled)) == pytest.approx(0, abs=0.01)
    assert cohesion(halves.reshape(1, 4, 4)) == pytest.approx(20 / 24 - 7 / 15)


def test_masks_that_differ_by_label():
    masks = np.array([[0, 0], [0, 0], [1, 1], [1, 1]])
    assert differ_by_label(masks, [0, 0, 1, 1]) == 1
    assert differ_by_label(masks, [0, 1, 0, 1]) == pytest.approx((0 + 1 + 1 + 0) / 4 - 1)


def test_each_pair_counts_by_its_share_of_places():
    masks = np.array([[[0, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]])
    # images 0 and 1 of one label differ in 1 of 4 places; 0 and 2 in 1, 1 and 2 in 2
    assert differ_by_label(masks, [5, 5, 3]) == pytest.approx((1 / 4 + 2 / 4) / 2 - 1 / 4)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_without_pairs_of_both_kinds(labels):
    with pytest.raises(ValueError, match="pairs of both kinds"):
        differ_by_label(np.zeros((3, 4)), labels)


def test_labels_and_choice_of_the_probe_images_by_hand():
    # of seven test images the first, fourth and last are probe images; then all of them
    few = SimpleNamespace(arrays={"test_label": np.arange(7), "probe_index": np.zeros(3)})
    assert probe_labels(few).tolist() == [0, 3, 6]
    few.arrays["probe_place"] = np.array([6, 1, 2])  # a record that says which they are
    assert probe_labels(few).tolist() == [6, 1, 2]
    labels = np.array([2, 2, 5, 0, 2, 5, 0])
    every = SimpleNamespace(arrays={"test_label": labels, "probe_index": np.arange(7)})
    assert probes_of_classes(every, 2, 2) == [0, 1, 2, 5]  # of classes 2 and 5
    assert probes_of_classes(every, 3, 1) == [3, 0, 2]
    assert probes_of_classes(every, 1, 9) == [0, 1, 4]
