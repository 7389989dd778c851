"""What tests of data sets share: an empty MOE_DATA."""

from __future__ import annotations

import pytest

from lib.inputs import sources


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty MOE_DATA, with nothing remembered from another one."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("MOE_DATA", str(folder))
    monkeypatch.setenv("MOE_CACHE", str(tmp_path / "cache"))
    sources.sources_of.cache_clear()
    yield folder
    sources.sources_of.cache_clear()
