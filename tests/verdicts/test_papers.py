"""Files of published values: read again once they changed, and nobody's copy is another's."""

from __future__ import annotations

import pytest

from lib import paths
from lib.verdicts import papers


def test_a_file_is_read_again_once_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PAPERS", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "a.yaml").write_text("paper: {short: first}\n")
    papers.load("a")["paper"]["short"] = "changed by a reader"
    assert papers.load("a")["paper"]["short"] == "first"
    (tmp_path / "a.yaml").write_text("paper: {short: the second}\n")
    assert papers.load("a")["paper"]["short"] == "the second"
    with pytest.raises(ValueError, match="no published values called 'b': known are a; a new pape"):
        papers.load("b")


def test_a_frame_may_be_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PAPERS", tmp_path)
    entry = "{columns: [top1], rows: [[70.0]], source: [Table 1]}"
    (tmp_path / "a.yaml").write_text(f"paper: {{}}\ntables: {{t: {entry}}}\n")
    frame = papers.table("a", "t")
    frame.loc[0, "top1"] = 0.0
    frame.attrs["source"].append("a reader")
    again = papers.table("a", "t")
    assert again["top1"].tolist() == [70.0] and again.attrs["source"] == ["Table 1"]
