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
