"""Bars of classes by expert: one panel a layer and set, widths that are shares."""

import numpy as np

from lib.report.class_shares import class_shares

# four classes; the last expert is padding in the first layer
EARLY = np.array([[3, 1, 0], [1, 3, 0], [2, 2, 0], [2, 2, 0]])
LATE = np.array([[4, 0, 0], [0, 4, 0], [0, 0, 4], [1, 1, 2]])


def test_a_bar_is_divided_as_the_tokens_of_its_class():
    sets = {"random": [0, 3], "look-alike": [1]}
    fig = class_shares({"block 1": EARLY, "block 2": LATE}, sets, ["ant", "bee", "cow", "dog"])
    first, alike, late, _ = fig.axes
    assert [ax.get_title() for ax in (first, alike)] == [
        "block 1, random classes",
        "block 1, look-alike classes",
    ]
    assert [label.get_text() for label in first.get_yticklabels()] == ["all", "ant", "dog"]
    widths = [bar.get_width() for bar in first.patches]
    assert widths == [50, 50, 75, 25, 50, 50]  # two experts: the empty one is not drawn
    assert [bar.get_width() for bar in late.patches][3:6] == [100, 0, 0]
    # the number of an expert stands where there is room for it
    assert [text.get_text() for text in late.texts if text.get_position()[1] == 1] == ["1"]
