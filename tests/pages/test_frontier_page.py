"""The picture of all methods: a panel for each cost that is known; what is not drawn is named."""

from __future__ import annotations

import json

import pytest

from lib import paths
from lib.pages import page
from lib.paths import ROOT
from lib.report import cost_figures
from lib.runs import collect
from lib.verdicts import budgets, speed
from lib.verdicts.speed import Ratio, Timing

NOTEBOOK = ROOT / "notebooks" / "beyond" / "frontier.ipynb"


@pytest.fixture
def drawn(monkeypatch):
    """Runs the page up to its picture, without computing: the costs drawn, and what is shown."""
    monkeypatch.setattr(page, "collect", lambda grid: collect.load(grid))
    axes = []
    fronts = cost_figures.fronts
    monkeypatch.setattr(
        cost_figures, "fronts", lambda models, costs: [axes.extend(costs), fronts(models, costs)][1]
    )

    def run():
        shown, space = [], {"__name__": "page"}
        space["display"] = shown.append
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), space)
            if "headline-figure" in cell["metadata"].get("tags", ()):
                break
        return list(axes), shown[-1]

    return run


def test_time_has_a_panel_only_where_it_was_measured(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BENCH", tmp_path)
    known = [name for cost, name in budgets.COSTS.items() if cost != "forward"]
    axes, figure = drawn()
    assert axes == known and figure.alt.startswith("By multiply-adds, the highest mean at a")
    assert "By time" not in figure.alt and figure.alt.endswith("3 scatter plots.")
    assert "python -m" not in figure.html and "Time:" not in figure.html


def test_a_measured_time_is_drawn(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BENCH", tmp_path)
    half, whole = Timing(10.0, 10.0), Timing(15.0, 15.0)
    name = "static, ridge in sequence, 50% active"
    row = Ratio("models", "x", "batch 16, frozen", "fp32", name, "dense", half, whole)
    speed.file_of("frontier").parent.mkdir(parents=True)
    speed.write(speed.file_of("frontier"), {"machine": {}}, [row])
    axes, figure = drawn()
    assert axes == list(budgets.COSTS.values()) and figure.alt.endswith("4 scatter plots.")
    assert (
        "By time of a forward pass, the highest mean at a share of the dense model's" in figure.alt
    )
    assert "Time: batch 16, frozen, fp32" in figure.html
