"""Blocks and experts are numbered from 1 wherever a page prints them; records count from 0."""

from __future__ import annotations

import json

import numpy as np
from factory import record

from lib.paths import ROOT
from lib.report import explorer, maps, overlays, routes
from lib.report.style import number


def texts(labels):
    return [label.get_text() for label in labels]


def test_the_first_block_and_the_first_expert_are_1():
    assert [number(index) for index in (0, 3, np.int16(7))] == [1, 4, 8]


def test_axes_name_experts_and_blocks_from_1():
    one = record(0)
    shares = routes.layer_shares({"a": one}).axes[0]
    assert (
        texts(shares.get_xticklabels()) == texts(shares.get_yticklabels()) == ["1", "2", "3", "4"]
    )
    by_class = maps.class_expert_counts({"a": one}).axes[0]
    assert texts(by_class.get_xticklabels()) == ["1", "2", "3", "4"]
    ordered = maps.class_expert_heatmap(one).axes[0]
    assert sorted(texts(ordered.get_xticklabels())) == ["1", "2", "3", "4"]
    route = routes.routes(one, [0]).axes[0]
    assert texts(route.get_yticklabels()) == ["1", "2", "3", "4"]
    assert texts(maps.expert_loads(one).axes[0].get_xticklabels()) == ["1", "2", "3", "4"]


def test_tables_name_experts_from_1():
    rows = maps.classes_by_expert(record(0))
    assert [row["expert"] for row in rows] == [1, 2, 3, 4]


def test_pictures_and_their_bar_name_experts_from_1():
    choices = np.zeros((1, 1, 5), int)
    choices[0, 0, 1:] = [0, 1, 1, 2]  # the class token goes to the first expert
    fig = overlays.token_maps(None, choices, [2], 3)
    picture, bar = fig.axes[0], fig.axes[-1]
    assert picture.get_title() == "block 3" and picture.get_xlabel() == "class token: 1"
    assert texts(picture.texts) == ["1", "2", "2", "3"]
    assert texts(bar.get_xticklabels()) == ["1", "2", "3"]


def test_the_explorer_keeps_indices_as_data_and_shows_numbers():
    choices = np.array([[[0, 0, 1, 1, 2]]])
    shown = explorer.explorer(None, choices, [2], 3, caption="Caption.", alt="Alt.")
    content = json.loads(shown._content(1))
    assert content["blocks"] == [3] and content["experts"] == [[[0, 1, 1, 2]]]
    written = (ROOT / "book" / "_static" / "routing.js").read_text(encoding="utf-8")
    assert "expert ${expert + 1} in" in written and ": expert + 1;" in written
