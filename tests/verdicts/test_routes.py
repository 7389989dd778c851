"""Ways of classes through a model, and the colours of the checkerboard, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.verdicts.routes import (
    colour_information,
    images_by_expert,
    main_expert,
    main_route,
    pairs_on_one_route,
    purity,
    shared_route_excess,
    widest_route,
)


def routed(first_layer, second_layer, names="abcd"):
    """A record of two layers, whose rows are the tokens of each class by expert."""
    counts = np.array([first_layer, second_layer])
    return SimpleNamespace(class_names=list(names), arrays={"class_expert": counts})


def board(experts_of_layers, pixels):
    """A record of the checkerboard; the token before the patches goes to expert 0."""
    maps = np.array([[0, *np.ravel(layer)] for layer in experts_of_layers], np.int8)
    data = SimpleNamespace(image_size=pixels)
    return SimpleNamespace(spec=SimpleNamespace(data=data), arrays={"checker_expert": maps})


# Classes a and b go 0, 1; class c parts in the second layer, class d in the first.
FOUR = routed([[9, 1], [6, 4], [7, 3], [2, 8]], [[0, 5], [1, 4], [5, 0], [0, 5]])


def test_main_route_and_its_shares():
    assert main_route(FOUR, 0) == ([0, 1], [0.9, 1.0])
    assert main_route(FOUR, 3) == ([1, 1], [0.8, 1.0])


def test_widest_route():
    assert widest_route(FOUR) == 50.0
    together = routed([[1, 0]] * 4, [[0, 1]] * 4)
    assert widest_route(together) == 100.0


def test_pairs_on_one_route():
    # of a-b, a-c, b-c one; of a-d, b-d, c-d none
    assert pairs_on_one_route(FOUR, ["a", "b", "c"]) == (pytest.approx(100 / 3), 0.0)
    # a-c does not; of a-b, a-d, c-b, c-d one does
    assert pairs_on_one_route(FOUR, ["a", "c"]) == (0.0, 25.0)
    # of two groups: a-b does, c-d does not; of the four pairs across none does
    assert pairs_on_one_route(FOUR, ["a", "b"], ["c", "d"]) == (50.0, 0.0)
    # neither a-c nor b-d; of a-b, a-d, c-b, c-d one does
    assert pairs_on_one_route(FOUR, ["a", "c"], ["b", "d"]) == (0.0, 25.0)


def test_excess_of_shared_routes():
    # the pair a, b shares its route, and of a-c, a-d, b-c, b-d none does
    assert shared_route_excess(FOUR, ["a", "b"]) == 100.0
    # of a-b, a-c, b-c one; of a-d, b-d, c-d none
    assert shared_route_excess(FOUR, ["a", "b", "c"]) == pytest.approx(100 / 3)
    # c-d does not; of c-a, c-b, d-a, d-b none does
    assert shared_route_excess(FOUR, ["c", "d"]) == 0.0
    # a-c does not; of a-b, a-d, c-b, c-d one does
    assert shared_route_excess(FOUR, ["a", "c"]) == -25.0


def test_one_route_for_all_is_no_excess():
    assert shared_route_excess(routed([[1, 0]] * 4, [[0, 1]] * 4), ["a", "b"]) == 0.0


ROW, COLUMN = np.mgrid[:4, :4]


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ((ROW + COLUMN) % 2, 1.0),  # by colour
        (2 * (ROW // 2) + COLUMN // 2, 0.0),  # by quarter of the image
        (ROW, 0.0),  # by row
        (0 * ROW, 0.0),  # one expert for all
    ],
)
def test_colour_or_place(experts, expected):
    assert colour_information(board([experts], pixels=8)) == pytest.approx(expected)


def test_colour_information_is_the_mean_over_layers():
    layers = [(ROW + COLUMN) % 2, ROW]
    assert colour_information(board(layers, pixels=8)) == pytest.approx(0.5)


def test_patches_without_one_colour_or_expert_do_not_count():
    # six patches in a row over four squares: the second and the fifth have both colours
    row, column = np.mgrid[:6, :6]
    square = np.array([0, 0, 1, 2, 0, 3])
    experts = (square[row] + square[column]) % 2
    is_mixed = np.isin(row, [1, 4]) | np.isin(column, [1, 4])
    experts[is_mixed] = 3
    assert colour_information(board([experts], pixels=12)) == pytest.approx(1.0)
    experts[0, 0] = experts[2, 3] = -1
    assert colour_information(board([experts], pixels=12)) == pytest.approx(1.0)


def test_patches_of_both_colours_alone_say_nothing():
    # two patches in a row over four squares
    assert colour_information(board([[[0, 1], [1, 0]]], pixels=8)) is None


def test_images_by_their_main_expert():
    # five images of two classes, two layers, two experts; the last image is a tie
    loads = [[3, 1], [0, 4], [4, 0], [1, 3], [2, 2]]
    run = SimpleNamespace(
        id="one",
        moe=[{"load": [0.5, 0.5]}] * 2,
        arrays={
            "image_loads": np.array([[[0, 4], load] for load in loads], np.uint16),
            "test_label": np.array([0, 0, 1, 1, 1]),
            "class_expert": np.zeros((2, 2, 2)),
        },
    )
    assert main_expert(run).tolist() == [0, 1, 0, 1, 0]
    assert images_by_expert(run).tolist() == [[1, 1], [2, 1]]
    assert purity(images_by_expert(run)) == 60.0  # two of three, and one of two
    del run.arrays["image_loads"]
    with pytest.raises(ValueError, match="record one .* whose spec has image_loads"):
        main_expert(run)
