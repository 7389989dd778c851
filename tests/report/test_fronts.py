"""Accuracy against several costs: the step of the best, and how models look."""

from __future__ import annotations

from lib.report.cost_figures import Priced, fronts
from lib.verdicts.stats import Interval


def model(family, top1, size, time=None, reference=False):
    costs = {"size": size} | ({} if time is None else {"time": time})
    return Priced(family, Interval(top1, top1 - 1, top1 + 1, 3), costs, reference)


MODELS = [
    model("dense", 80.0, 100.0, 10.0, reference=True),
    model("dense again", 82.0, 100.0, 20.0, reference=True),
    model("cut", 70.0, 50.0),
    model("cut", 60.0, 30.0),
    model("beaten", 65.0, 60.0),
]


def drawn(ax):
    """Lines with markers, by label: places, and whether they are filled."""
    marks = [(container.get_label(), container.lines[0]) for container in ax.containers]
    return [
        (label, *line.get_xydata()[0], line.get_markerfacecolor() != "white")
        for label, line in marks
    ]


def test_the_step_leads_along_what_nothing_beats():
    size, time = fronts(MODELS, ["size", "time"]).axes
    assert drawn(size) == [
        ("dense", 100.0, 80.0, False),
        ("dense again", 100.0, 82.0, True),
        ("cut", 50.0, 70.0, True),
        ("cut", 30.0, 60.0, True),
        ("beaten", 60.0, 65.0, False),
    ]
    step, family = (line.get_xydata().tolist() for line in size.lines[:2])
    assert step[:3] == [[30.0, 60.0], [50.0, 70.0], [100.0, 82.0]] and step[3][1] == 82.0
    assert step[3][0] > 100.0  # the best stays the best at any larger cost
    assert family == [[30.0, 60.0], [50.0, 70.0]]
    # what was not measured is not drawn
    assert [name for name, *_ in drawn(time)] == ["dense", "dense again"]


def test_families_differ_in_look_and_a_cost_that_no_model_has_is_said():
    many = [model(f"method {i}", 50.0 + i, 10.0 * i) for i in range(13)]
    size, empty, time, hidden = fronts([*many, *MODELS], ["size", "none has it", "time"]).axes
    looks = {
        container.get_label(): (container.lines[0].get_color(), container.lines[0].get_marker())
        for container in size.containers
    }
    assert len(set(looks.values())) == len(looks) == 17
    assert looks["dense"][0] == looks["dense again"][0] == "black"
    assert [text.get_text() for text in empty.texts] == ["not measured"]
    assert not hidden.get_visible() and time.get_visible()
    # an empty panel takes the ticks off itself alone
    size.figure.draw_without_rendering()
    for ax in (size, time):
        assert all(tick.label1.get_visible() for tick in ax.yaxis.get_major_ticks())
    assert not any(tick.label1.get_visible() for tick in empty.yaxis.get_major_ticks())
