"""The table of `python -m benchmarks.store`: what it asks of a store, on a small one."""

from __future__ import annotations

from benchmarks import store as bench
from lib.pages import manifest
from lib.runs import collect
from lib.runs.store import Store


def test_copies_are_what_the_table_says(tmp_path):
    where = Store(tmp_path / "published", tmp_path / "cache")
    specs = bench.copies(bench.computed(tmp_path), bench.PAGE, where)
    assert len({spec.id for spec in specs}) == bench.PAGE
    assert {collect.status_of(spec, where) for spec in specs} == {"done"}
    assert len(bench.times(where, specs)) == 4  # each asks, and checks what it was told


def test_pages_are_checked_in_full(tmp_path, monkeypatch):
    hashed = []
    original = manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda path: hashed.append(path) or original(path))
    files = len(manifest.code_and_papers())
    hashed.clear()
    bench.staleness(3, tmp_path)
    assert len(hashed) == 4 * files  # once to make the copy, once for each page
    assert manifest.executed("a/b").name == "b.ipynb"
