"""Published tables on a page: retold values are marked, and the source is named."""

import pandas as pd
import pytest

from lib.report import published
from lib.report.tables import secondary


def printed(rows, source):
    frame = pd.DataFrame(rows, columns=["model", "cut", "other"])
    frame.attrs = {"about": f"what {source} shows", "source": {"paper": "x", "table": source}}
    return frame


FIRST = printed([("B", 30.0, 1), ("A", 20.0, 2)], "a note")
SECOND = printed([("A", 25.0, 3), ("C", 50.0, 4), ("B", 35.0, 5)], "a report")


def test_retold_values_name_the_source_of_their_table():
    marked = published.retold(FIRST.rename(columns={"cut": "macs_cut"}), ["macs_cut"])
    assert list(marked) == ["MACs saved (%)"]
    assert list(marked["MACs saved (%)"]) == [secondary(30.0, "a note"), secondary(20.0, "a note")]


def test_side_by_side_has_the_models_of_the_first_table():
    rows = published.side_by_side({"ours": FIRST, "theirs": SECOND}, ["cut"])
    assert list(rows) == ["model", "method", "cut"]
    assert list(zip(rows.model, rows.method, strict=True)) == [
        ("A", "ours"),
        ("A", "theirs"),
        ("B", "ours"),
        ("B", "theirs"),
    ]
    assert rows["cut"].iloc[1] == secondary(25.0, "a report")


def test_means_have_their_deviations_beside_them():
    frame = pd.DataFrame({"top1": [81.24, 9.0], "top1_std": [0.36, 1.0]})
    assert published.with_deviations(frame, "top1", 1) == ["81.2 (sd 0.4)", "9.0 (sd 1.0)"]
    assert published.with_deviations(frame, "top1") == ["81 (sd 0)", "9 (sd 1)"]


def test_an_unknown_column_is_refused():
    with pytest.raises(KeyError, match="depth"):
        published.retold(FIRST, ["depth"])


def test_as_printed_names_what_and_whence():
    shown = published.as_printed(FIRST, "Not ours.", decimals=2)
    assert shown.caption == "What a note shows; a note. Not ours."
    assert list(shown.frame["cut"]) == ["30.00", "20.00"]
    named = FIRST.rename(columns={"cut": "gmacs"})
    assert "MACs (G)" in published.as_printed(named, "Not ours.").frame
