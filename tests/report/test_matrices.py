"""Matrices in the shape of a printed table: cells by hand, marks of absent ones, HTML."""

import pytest

from lib.report import NOT_YET
from lib.report.matrices import Matrix, matrices
from lib.verdicts.stats import Interval

THREE = Interval(57.24, 56.0, 58.2, 3, "hierarchical bootstrap 95%")
CELLS = {
    ("no shared", 2, 1): THREE,
    ("no shared", 2, 12): Interval(9.66, None, None, 1),
    ("shared", 2, 1): None,
}


@pytest.fixture
def shown():
    parts = [
        Matrix("published", {("no shared", 2, 1): 91.4, ("no shared", 2, 12): 91.25}),
        Matrix("reproduced", CELLS, is_planned=True),
        Matrix(
            "difference",
            {("shared", 2, 1): Interval(-0.04, -0.5, 0.3, 5, THREE.method)},
            signed=True,
        ),
        Matrix("this build", {("shared", 2, 1): None}, folded=True),
    ]
    return matrices(parts, ("arm", "N", "L"), caption="Top-1 & so on.")


def test_settings_go_down_and_the_last_one_across(shown):
    published, reproduced, *_ = (table.frame for table in shown.tables)
    assert list(reproduced) == ["arm", "N", "L=1", "L=12"]
    assert reproduced[["arm", "N"]].to_numpy().tolist() == [["no shared", "2"], ["shared", "2"]]
    assert published.to_numpy().tolist() == [["no shared", "2", "91.4", "91.2"]]


def test_a_cell_has_half_its_interval_and_n_and_none_with_one_seed(shown):
    _, reproduced, difference, build = (table.frame for table in shown.tables)
    assert reproduced["L=1"].tolist() == ["57.2\n±1.1, n=3", "–"]
    assert reproduced["L=12"].tolist() == ["9.7\nn=1", ""]  # nothing was asked for
    assert difference["L=1"].tolist() == ["+0.0\n±0.4, n=5"]
    assert build["L=1"].tolist() == [""]
    assert shown.notes == (
        "± is half the width of the interval.",
        "Intervals: hierarchical bootstrap 95% over n seeds; none where n is below 3.",
        f"– {NOT_YET}",
    )


def test_html_is_one_figure_whose_folded_part_opens_on_a_click(shown):
    text = shown.html
    assert text.count("<figure") == 1 and text.count("<table") == 4
    assert "Top-1 &amp; so on." in text and f"<div>– {NOT_YET}</div>" in text
    before, folded = text.split("<details><summary>this build</summary>")
    assert before.count("<table") == 3 and folded.count("<table") == 1
    assert "white-space: pre;" in text  # the two lines of a cell
    assert "reproduced" in repr(shown) and "57.2 ±1.1, n=3" in repr(shown)


def test_without_an_interval_there_is_no_note_of_one():
    shown = matrices([Matrix("published", {("a", 1): 1.0})], ("arm", "L"), caption="Printed.")
    assert shown.notes == ()
