"""Names of classes, data sets and arms are drawn letter by letter, whatever letters they have."""

import html
import re

import pandas as pd
import pytest
from factory import record
from matplotlib.text import Text

from lib.report import cost_figures, figures, maps, overlays, relations, routes, schematic, style
from lib.report.class_shares import class_shares
from lib.report.tables import table

# the second and the third are mathematics that does not parse, the fourth has two formulas' ends
NAMES = [
    "$5 bills$",
    r"$\frac$",
    "$x^$ and $y_$",
    r"\$1 or $2\$",
    "a^b_c",
    r"C:\temp\new",
    "<img src=x onerror=alert(1)>",
    "salt & pepper <b>",
    "100% #1 {a}",
    "*bold* `code` [x](y)",
]


def with_names(**changes):
    return record(0, class_names=NAMES, **changes)


DRAWN = {
    "heatmap": lambda: maps.class_expert_heatmap(with_names()),
    "counts": lambda: maps.class_expert_counts({"arm": with_names(blocks=[0])}),
    "routes": lambda: routes.routes(with_names(), range(10)),
    "token maps": lambda: overlays.token_maps(
        None, with_names().arrays["token_expert"][:, :10], range(4), 4, names=NAMES, layers=[0]
    ),
    "shares": lambda: class_shares(
        {"first": with_names().arrays["class_expert"][0]}, {"all": range(10)}, NAMES
    ),
    "legend": lambda: figures.scan({"x": [figures.Curve([1], [4.0], name) for name in NAMES]}),
    "titles": lambda: figures.scan({name: [figures.Curve([1], [4.0], "x")] for name in NAMES}),
    "costs": lambda: cost_figures.cost_ratio(dict.fromkeys(NAMES, 1.0)),
}


def letters(text: str) -> str:
    """Leaves out what names lose and lines gain on their way into a figure."""
    return re.sub(r"[\s_]", "", text)


@pytest.mark.parametrize("name", DRAWN)
def test_names_are_drawn_as_they_are_written(name):
    fig = DRAWN[name]()
    with style.style():
        fig.draw_without_rendering()  # mathematics that does not parse would raise
    drawn = [text for text in fig.findobj(Text) if text.get_visible() and text.get_text()]
    for wanted in NAMES:
        texts = [text for text in drawn if letters(wanted) in letters(text.get_text())]
        assert texts, f"{wanted} is not in the figure"
        assert not any(text.get_parse_math() for text in texts)


def test_two_names_that_mathematics_makes_one_look_different():
    pictures = []
    for label in ("$a b$", "$ab$", "ab"):
        pictures.append(style.png(cost_figures.cost_ratio({label: 1.0})))
    assert len(set(pictures)) == 3


def test_formulas_of_ours_are_formulas_and_ticks_are_plain():
    drawn = schematic.moe_layer().findobj(Text)
    formulas = [text for text in drawn if "$" in text.get_text()]
    assert len(formulas) == 6 and all(text.get_parse_math() for text in formulas)
    scatter = relations.scatter({"": ([1e-8, 2e-5], [2.0, 4.0])}, xlabel="x", ylabel="y", log=True)
    with style.style():
        scatter.draw_without_rendering()
    ticks = [text.get_text() for text in scatter.findobj(Text)]
    assert "1e−08" in ticks and "3" in ticks and not any("$" in tick for tick in ticks)


@pytest.mark.parametrize("name", NAMES)
def test_captions_and_tables_show_names_as_they_are_written(name):
    with style.style():
        shown = style.show(style.figure()[0], name, f"A figure of {name}")
    rows = table(pd.DataFrame({name: [name]}), caption=name)
    for page in (shown._repr_html_(), rows._repr_html_()):
        page = re.sub('data:image/png;base64[^"]*', "", page)
        assert "<img src=x" not in page and "<b>" not in page
        assert letters(html.escape(name)) in letters(page)
