"""Rows, curves and the front of models beside their dense one."""

from lib.report import sizes
from lib.report.relations import Spot
from lib.verdicts.sizes import SizedModel
from lib.verdicts.stats import Interval


def model(method, level, macs, stored, top1):
    top = Interval(top1, None, None, 1)
    return SizedModel(method, level, macs, stored, top, Interval(top1 / 0.8, None, None, 1))


STATIC = [model("static", 0.5, 60.0, 60.04, 70.0), model("static", 0.3, 40.0, 40.0, 50.0)]
MIXTURES = [model("experts", 0.5, 61.0, 300.0, 75.0), model("experts", 0.3, 41.0, 200.0, 49.0)]
ABSENT = SizedModel("static", 0.2)


def test_rows_leave_the_cells_of_an_absent_model_empty():
    first, absent = sizes.rows([STATIC[0], ABSENT])
    assert first == {
        "active": "50%",
        "method": "static",
        "top-1 (%)": STATIC[0].top1,
        "of the dense (%)": 87.5,
        "MACs (% of dense)": 60.0,
        "stored (% of dense)": 60.04,
    }
    assert list(absent.values()) == ["20%", "static", None, None, None, None]


def test_one_curve_a_method_from_small_to_large():
    panels = {"ours": [*STATIC, ABSENT, *MIXTURES], "empty": [ABSENT]}
    fig = sizes.accuracy_over(panels, "params_stored", ("experts", "static", "unknown"))
    ours, empty = fig.axes
    assert [line.get_label() for line in ours.containers] == ["experts", "static"]
    lines = [container.lines[0].get_xydata().tolist() for container in ours.containers]
    assert lines == [[[200.0, 49.0], [300.0, 75.0]], [[40.0, 50.0], [60.0, 70.0]]]
    assert ours.get_xlabel() == "stored parameters (% of the dense model's)"
    assert not empty.containers and empty.texts  # says that there is no record
    assert "multiply-adds" in sizes.accuracy_over(panels, "macs", ["static"]).axes[0].get_xlabel()


def test_lines_far_below_leave_the_others_a_panel_of_their_own():
    low = [model("low", 0.3, 30.0, 40.0, 5.0), model("low", 0.5, 60.0, 60.0, 60.0)]
    panels = {"ours": [*STATIC, *MIXTURES, *low]}
    drawn = [
        [line.get_label() for line in ax.containers]
        for ax in sizes.accuracy_over(panels, "macs", ("low", "experts", "static")).axes
    ]
    assert drawn == [["low", "experts", "static"], ["experts", "static"]]
    said = sizes.order_over(panels["ours"], "macs", ("low", "experts", "static"))
    assert ". A second panel leaves out the lowest: low. Line plot" in said
    assert "second" not in sizes.order_over(panels["ours"], "macs", ("experts", "static"))
    # half is near enough, and one line alone has nothing to be told from
    half = [model("low", 0.3, 30.0, 40.0, 25.0)]
    for models in ([*STATIC, *half], [*STATIC, *low]):
        assert len(sizes.accuracy_over({"ours": models}, "macs", ("low", "static")).axes) == 1


def test_the_order_of_the_lines_is_told_at_a_size_that_all_have():
    models = [*STATIC, ABSENT, *MIXTURES, model("left out", 0.3, 1.0, 1.0, 99.0)]
    said = sizes.order_over(models, "macs", ("experts", "static"))
    assert said == (
        "At 41% of the multiply-adds, from the most accurate down: static, then experts. Line plot "
        "of accuracy over multiply-adds, one line a method."
    )
    # the line that begins last decides where they are compared: there "late" is the worst
    late = [model("late", 0.9, 80.0, 80.0, 20.0), model("late", 0.95, 90.0, 90.0, 90.0)]
    said = sizes.order_over([*models, *late], "macs", ("experts", "static", "late"))
    assert "At 80% of the multiply-adds" in said and "static, then late." in said
    said = sizes.order_over(models, "params_stored", ("experts", "static"))
    assert said == (
        "By what their smallest model stores, from the most down: experts, then static. Line plot "
        "of accuracy over stored parameters, one line a method."
    )


def test_the_front_has_what_nothing_beats():
    found = list(sizes.front_rows([*STATIC, ABSENT, *MIXTURES]))
    # the small mixture computes and stores more than the small static model, for less accuracy
    assert [row["method"] for row in found] == ["static, 50%", "static, 30%", "experts, 50%"]
    assert list(found[0].values())[1:] == [60.0, 60.04, STATIC[0].top1]


def test_surface_tells_mixtures_from_static_models(monkeypatch):
    drawn = {}
    monkeypatch.setattr(sizes.relations, "surface", drawn.update)
    sizes.surface({"ours": [STATIC[0], ABSENT, MIXTURES[0]], "empty": [ABSENT]}, "experts".__eq__)
    assert drawn == {
        "ours": [
            Spot("static", 60.0, 60.04, 70.0, False),
            Spot("experts", 61.0, 300.0, 75.0, True),
        ]
    }


def test_surface_draws():
    fig = sizes.surface({"ours": [*STATIC, *MIXTURES]}, "experts".__eq__)
    assert fig.axes[0].get_title() == "ours"
    assert len(fig.axes) == 2  # the panel and its colour bar
