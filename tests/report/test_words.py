"""Words for alternative texts, from values by hand."""

from typing import get_args, get_type_hints

from lib.report import words
from lib.report.figures import Curve
from lib.spec import DropSpec
from lib.verdicts.stats import Interval


def test_order_runs_from_the_highest_to_the_lowest_and_names_what_has_no_value():
    values = {"a": 1.0, "b": Interval(3.0, 2.5, 3.5, 3), "c": None, "d": 2.0}
    assert words.order(values) == "b, then d, then a; no value yet of c"
    assert words.order({"a": 1.0, "b": 2.0, "c": 1.0}) == "b, then a, level with c"
    assert words.order({"a": None, "b": None}) == "no value yet of a, b"
    assert words.order({"N=2, L=5": 1.0}) == "N=2 L=5"


def test_order_claims_one_only_between_intervals_that_lie_apart():
    values = {
        "one": Interval(9.0, None, None, 1),
        "high": Interval(8.0, 7.0, 9.0, 3),
        "beside it": Interval(7.5, 6.5, 8.5, 10),
        "touching": Interval(6.0, 5.5, 6.5, 3),
        "apart": Interval(5.0, 4.9, 5.4, 3),
    }
    assert words.order(values) == "one, then high, then beside it, then touching, above apart"
    assert words.order({"a": 1.0, "b": values["apart"]}) == "b, then a"


def test_a_difference_moves_where_its_interval_leaves_zero_out():
    assert words.move(Interval(1.0, 0.1, 1.9, 3)) == "a rise"
    assert words.move(Interval(-1.0, -1.9, -0.1, 3)) == "a fall"
    assert words.move(Interval(1.0, 0.0, 2.0, 3)) == "no change beyond chance"
    assert words.move(Interval(-9.0, None, None, 1)) == "too few seeds to say"


def test_changes_compare_the_last_value_with_the_first_that_are_there():
    curves = [
        Curve([1, 2, 3], [50.0, 90.0, 51.0], "N=2", "shared"),
        Curve([1, 2, 3], [None, 60.0, Interval(50.0, 49, 51, 3)], "N=4", "shared"),
        Curve([1, 2], [50.0, 51.1], "N=8"),
        Curve([1, 2], [50.0, None], "N=16"),
        Curve([1, 2], [None, None], "N=32"),
        Curve([1, 2], [91.5, 52.9], "N=64"),
    ]
    assert words.changes(curves) == (
        "rising N=8; level N=2 shared; falling N=4 shared, N=64; one value N=16; no value yet N=32"
    )
    assert words.change([3.0, None, 1.9]) == "falling"
    panels = {"published": curves[2:3], "reproduced": curves[5:]}
    assert words.changes_by_panel(panels) == "Published: rising N=8. Reproduced: falling N=64."
    assert words.order_by_panel({"published": {"a": 1.0}, "this build": {"a": 1.0, "b": 2.0}}) == (
        "Published: a. This build: b, then a."
    )


def test_extremes_say_where_a_line_that_jumps_is_lowest_and_highest():
    noise = Curve([1, 2, 3, 4], [0.9, Interval(0.1, 0.0, 0.2, 3), None, 0.8], "noise")
    stable = Curve([1, 2, 3], [0.2, 0.1, 1.0], "stability")
    said = "Noise: lowest at block 2, highest at block 1"
    assert words.extremes([noise, Curve([1], [None], "none")], "block") == f"{said}."
    assert words.extremes([noise, stable], "block") == (
        f"{said}; stability: lowest at block 2, highest at block 3."
    )
    tied = Curve([3, 5, 7, 9], [1.0, 0.5, 1.0, 1.0], "stability")
    assert words.extremes([tied], "block") == (
        "Stability: lowest at block 5, highest at blocks 3, 7 and 9."
    )
    assert words.extremes([Curve([1, 2], [0.5, 0.5], "load")], "block") == "Load: one value."
    assert words.extremes([], "block") == "No value yet."


def test_every_score_of_experts_has_a_word_of_its_own():
    names = get_args(get_type_hints(DropSpec)["score"])
    called = [words.score(name) for name in names]
    assert len(set(called)) == len(names) and not any("_" in word for word in called)
    assert words.score("router_norm_change") == "router norm change" and words.score("man") == "MAN"
