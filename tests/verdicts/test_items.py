"""The tables and figures of the documents: entries, what is refused, and how much is there."""

from __future__ import annotations

import json
import re

import pytest

from lib import paths
from lib.pages import contents, parameters, profiles
from lib.verdicts import items

ENTRY = """
  - id: T5
    what: "Accuracy over layers."
    page: a/one
    arms: [dense, "N=?, L=*"]
"""


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """A function that writes the items of a study of one's own."""
    monkeypatch.setattr(paths, "PAPERS", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return lambda text, study="a": (tmp_path / f"{study}.yaml").write_text(f"items:{text}")


def test_an_item_knows_its_name_its_label_and_its_runs(papers):
    papers(ENTRY + "  - {id: F12, what: x, page: a/one, runs: a/two, arms: [y]}\n")
    papers(" null\n", "b")
    table, figure = items.of_study("a")
    assert (table.name, table.anchor, table.runs_page) == ("Table 5", "a-t5", "a/one")
    assert (figure.name, figure.anchor, figure.runs_page) == ("Figure 12", "a-f12", "a/two")
    assert items.studies() == ["a"] and items.of_study("b") == []
    papers("\n  - {id: T, what: x, page: a/one}\n")
    assert [(i.name, i.anchor) for i in items.of_study("a")] == [("Table", "a-t")]


def test_its_cells_are_the_arms_that_fit_one_of_its_patterns(papers):
    papers(ENTRY)
    (table,) = items.of_study("a")
    planned = ["N=4, L=12", "dense", "N=8, L=1", "N=16, L=1", "dense again"]
    assert table.arms_among(planned) == ["N=4, L=12", "dense", "N=8, L=1"]
    with pytest.raises(ValueError, match="item T5: a/one plans no runs called 'N=., L=.'; it plan"):
        table.arms_among(["dense"])


@pytest.mark.parametrize(
    "entry, cells, filled, state",
    [
        ({"page": "a/one"}, 0, 0, "whole"),
        ({"page": "a/one"}, 6, 6, "whole"),
        ({"page": "a/one", "differs": "Other data."}, 6, 6, "whole"),
        ({"page": "a/one", "lacks": "A row."}, 6, 6, "partly"),
        ({"page": "a/one", "lacks": "A row."}, 0, 0, "partly"),
        ({"page": "a/one"}, 6, 5, "partly"),
        ({"page": "a/one"}, 6, 0, "absent"),
        ({"lacks": "All of it."}, 0, 0, "absent"),
    ],
)
def test_how_much_is_there(entry, cells, filled, state):
    item = items.Item(study="a", id="T1", what="x", **entry)
    assert item.state(cells, filled) == state


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("id: T5", "id: t5", "t5: id: String should match"),
        ("page: a/one", "differs: x", "without a `page` give `lacks`"),
        ('arms: [dense, "N=?, L=*"]', "runs: a/two", "give these, too"),
        ("what:", "shows:", "what: Field required; shows: Extra inputs"),
        ("arms:", "state: whole\n    arms:", "state: Extra inputs"),
    ],
)
def test_refused(papers, old, new, says):
    papers(ENTRY.replace(old, new))
    with pytest.raises(ValueError, match=f"data/papers/a.yaml, item .*{says}"):
        items.of_study("a")


def test_an_item_is_there_once(papers):
    papers(ENTRY + ENTRY)
    with pytest.raises(ValueError, match="a.yaml has two items T5"):
        items.of_study("a")


# ---- the real list

OF_DOCUMENT = {
    "vimoe": {"T": 5, "F": 7},
    "durham": {"T": 6, "F": 14},
    "leiden": {"T": 3, "F": 6},
}
SHOWN = [item for study in items.studies() for item in items.of_study(study) if item.page]


def test_every_table_and_figure_of_the_documents_is_listed():
    for study, counts in OF_DOCUMENT.items():
        wanted = [f"{kind}{i}" for kind, n in counts.items() for i in range(1, n + 1)]
        assert [item.id for item in items.of_study(study)] == wanted
    # of MoEE the abstract page alone could be read, of the fifth document nothing with a number
    assert [item.id for item in items.of_study("moee")] == ["T", "F2", "F3", "F4", "F5"]
    assert set(items.studies()) == {*OF_DOCUMENT, "moee"}


def test_every_label_is_on_its_page_and_nowhere_else():
    book = contents.in_book()
    assert {item.page for item in SHOWN} <= set(book)
    labels = {}  # label: the pages that have it, as often as they have it
    for key in book:
        for cell in json.loads(parameters.source(key).read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                source = "".join(cell["source"])
                for label in re.findall(r"^\(([^()\s]+)\)=$", source, re.MULTILINE):
                    labels.setdefault(label, []).append(key)
    assert labels == {item.anchor: [item.page] for item in SHOWN}


def test_every_arm_is_planned():
    planned = {
        key: profiles.plan(key, profiles.PUBLISHED)
        for key in {item.runs_page for item in SHOWN if item.arms}
    }
    for item in SHOWN:
        assert bool(item.arms_among(planned.get(item.runs_page, {}))) == bool(item.arms)
