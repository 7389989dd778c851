"""The CSV beside a figure has the numbers that were put into it."""

from __future__ import annotations

import base64
import csv
import io
import re
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_figures import FIGURES

from lib.report import figure_data, figures, maps, relations, style
from lib.report.figure_data import csv_of
from lib.verdicts.stats import Interval


def rows(fig: Figure) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_of(fig))))


def drawn(**subplots):
    with style.style():
        fig, axes = style.figure(**subplots)
    return fig, axes[0]


def test_bars_have_their_names_lengths_and_the_ends_of_their_error_bars():
    fig, (ax,) = drawn()
    names, means, ends = ["dense", "one expert"], [76.5, 80.25], [[0.5, 1.25], [1.0, 2.5]]
    ax.bar(names, means, yerr=ends, label="CIFAR-100")
    ax.set(xlabel="arm", ylabel="top-1 (%)", title="a panel alone has no column")
    assert csv_of(fig) == (
        "series,arm,top-1 (%),low,high\n"
        "CIFAR-100,dense,76.5,76,77.5\n"
        "CIFAR-100,one expert,80.25,79,82.75\n"
    )


def test_bars_side_by_side_share_the_name_of_their_tick_and_lying_ones_their_row():
    fig, (ax,) = drawn()
    ax.bar([-0.2, 0.8], [1, 2], 0.4, label="fp32")
    ax.bar([0.2, 1.2], [3, 4], 0.4, label="bf16")
    ax.set_xticks([0, 1], ["large\nbatch", "one image"])
    read = [(row["series"], row["x"], row["y"]) for row in rows(fig)]
    assert read == [
        ("fp32", "large batch", "1"),
        ("fp32", "one image", "2"),
        ("bf16", "large batch", "3"),
        ("bf16", "one image", "4"),
    ]
    fig, (ax,) = drawn()
    ax.barh(["a"], [5.5], left=1.0, xerr=[[0.5], [0.25]])
    assert rows(fig) == [
        {"x": "5.5", "y": "a", "low": "6", "high": "6.75", "from": "1", "to": "6.5"}
    ]


def test_a_heat_map_has_a_row_for_each_cell():
    table = np.array([[0.0, 0.25, 1 / 3], [1.0, np.nan, 0.5]])
    fig = relations.matrices({"block 2": table, "block 3": 1 - table}, "similarity")
    read = rows(fig)
    assert list(read[0]) == ["panel", "expert (across)", "expert (down)", "similarity"]
    for panel, values in (("block 2", table), ("block 3", 1 - table)):
        cells = [row for row in read if row["panel"] == panel]
        back = np.full(values.shape, np.inf)
        for cell in cells:
            place = int(cell["expert (down)"]) - 1, int(cell["expert (across)"]) - 1
            back[place] = float(cell["similarity"] or "nan")
        assert len(cells) == values.size
        np.testing.assert_allclose(back, values, rtol=1e-5)


def test_places_between_ticks_are_counted_as_the_ticks_are():
    """Of twelve experts only some have a tick."""
    fig = relations.matrices({"block 2": np.arange(144.0).reshape(12, 12)}, "similarity")
    assert [text.get_text() for text in fig.axes[0].get_xticklabels()] == ["1", "5", "9"]
    read = [(int(r["expert (down)"]), int(r["expert (across)"])) for r in rows(fig)]
    assert read == [(i, j) for i in range(1, 13) for j in range(1, 13)]


def test_a_scan_has_its_intervals_and_its_baseline_and_panels_that_are_empty_none():
    ours = Interval(80.5, 79.25, 81.0, 3, "bootstrap")
    curves = [
        figures.Curve([1, 2], [ours, None], "N=8", "shared"),
        figures.Curve([4], [77.0], "N=2"),
    ]
    panels = {"reproduced": curves, "this build": [], "published": curves[1:]}
    read = rows(figures.scan(panels, {"reproduced": 76.0}))
    values = [tuple(row.values()) for row in read]
    assert list(read[0]) == [
        "panel",
        "series",
        "number of MoE layers L",
        "top-1 accuracy (%)",
        "low",
        "high",
    ]
    assert values == [
        ("reproduced", "N=8, shared", "1", "80.5", "79.25", "81"),
        ("reproduced", "N=2", "4", "77", "", ""),
        ("reproduced", "no MoE layer", "", "76", "", ""),
        ("published", "N=2", "4", "77", "", ""),
    ]


def test_free_segments_are_intervals_and_points_keep_the_value_of_their_colour():
    fig, (ax,) = drawn()
    ax.hlines([0, 1], [2.0, 3.0], [1.5, 2.5])
    ax.plot([2.0, 3.0], [0, 1], linestyle="", label="fp32")
    points = ax.scatter([5], [6], c=[0.125])
    fig.colorbar(points, label="accuracy")
    assert csv_of(fig) == (
        "series,x,y,accuracy,low,high\nfp32,2,0,,1.5,2\nfp32,3,1,,2.5,3\n,5,6,0.125,,\n"
    )


def test_hidden_names_tell_series_apart():
    class Record:
        id, test, moe = "r", {}, [{"block": 3, "load": [0.25, 0.75]}, {"block": 5, "load": [1.0]}]

    read = rows(maps.expert_loads(Record()))
    assert [(row["series"], row["block (1 = first)"]) for row in read] == [
        ("expert 0", "4"),
        ("expert 1", "4"),
        ("expert 0", "6"),
    ]
    assert [row["share of assignments (%)"] for row in read] == ["25", "75", "100"]
    assert (read[1]["from"], read[1]["to"]) == ("25", "100")


def test_panels_take_names_from_their_row_and_joining_lines_have_no_rows():
    fig, axes = drawn(columns=2)
    axes[0].set(ylabel="class", title="one")
    for ax in axes:
        ax.plot([1, 2], [3, 4], marker="", linestyle="-")
        ax.scatter([1], [3])
    assert csv_of(fig) == "panel,x,class\none,1,3\n2,1,3\n"


def test_pictures_schemes_and_empty_panels_have_none():
    fig, (ax,) = drawn()
    style.note(ax, "no record yet")
    assert csv_of(fig) == "" and figure_data.csv_link(fig, "c") == ""
    fig, (ax, other) = drawn(columns=2)
    ax.imshow(np.zeros((4, 4, 3)))
    other.plot([1, 2], [3, 4])
    assert csv_of(fig) == ""
    other.axis("off")
    ax.images[0].remove()
    assert csv_of(fig) == ""


def test_the_link_holds_the_same_text_and_the_picture_stays_the_same():
    fig, (ax,) = drawn()
    ax.plot([1, 2], [0.5, 1e7], label='a "b", <c> & 100%')
    before = style.png(fig)
    shown = style.show(fig, "Top-1 & loss, by L: nine words that go on.", "A line.")
    name, data = re.search(
        r'download="([^"]+)" href="data:text/csv[^,]*,([^"]+)"', shown.html
    ).groups()
    assert name == "top-1-loss-by-l-nine.csv"
    assert (
        unquote(data)
        == csv_of(fig)
        == ('series,x,y\n"a ""b"", <c> & 100%",1,0.5\n"a ""b"", <c> & 100%",2,10000000\n')
    )
    assert base64.b64encode(before).decode() in shown.html


@pytest.mark.parametrize(("points", "linked"), [(1000, True), (30_000, False)])
def test_too_many_numbers_have_no_link(points, linked):
    fig, (ax,) = drawn()
    ax.plot(np.arange(points) / 7, np.arange(points) / 3)
    assert ("<a " in figure_data.csv_link(fig, "Points.")) == linked


@pytest.mark.parametrize("name", FIGURES)
def test_each_kind_of_figure_gives_rows_as_long_as_its_header_or_none(name):
    fig = FIGURES[name]()
    style.png(fig, dpi=40)  # as on the page, where it is read after it was drawn
    table = list(csv.reader(io.StringIO(csv_of(fig))))
    assert {len(row) for row in table} <= {len(table[0]) if table else 0}
    assert not table or (len(table) > 1 and len(set(table[0])) == len(table[0]))
