"""The index of a store: what was verified and has not changed is not opened again, and whatever
was changed is read in full."""

from __future__ import annotations

import json
import os
import warnings

import pytest

from benchmarks.store import RUN, computed, copies
from lib.runs import collect as runs
from lib.runs import index, order
from lib.runs import store as store_module
from lib.runs.estimate import Estimates
from lib.runs.store import Store

COUNT = 30


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return computed(tmp_path_factory.mktemp("first"))


@pytest.fixture
def opened(monkeypatch):
    """The files of records that were read and verified."""
    files = []

    def verified(file):
        files.append(file.stem)
        return original(file)

    original = store_module.verified
    monkeypatch.setattr(store_module, "verified", verified)
    return files


@pytest.fixture
def filled(first, tmp_path, monkeypatch):
    """A store of copies of a record that is some seconds old, and their specs."""
    specs = copies(first, COUNT, Store(tmp_path / "published", tmp_path / "cache"))
    monkeypatch.setattr(index, "TICK", 0)
    return Store(tmp_path / "published", tmp_path / "cache"), specs


def again(where):
    """The same store, as another process has it."""
    where.index.save()
    return Store(where.published, where.private)


def test_copies_are_sound_records(filled):
    where, specs = filled
    [records] = runs.load({"": specs}, where).values()
    assert [record.id for record in records] == [spec.id for spec in specs]
    assert all(record.arrays["test_pred"].shape == (50,) for record in records)


def test_nothing_is_opened_twice_by_plans(filled, opened):
    where, specs = filled
    more = RUN.but(seed=COUNT + 1)
    grid = {"x": [*specs, more]}
    for turn in range(3):
        where = again(where)
        assert [runs.status_of(spec, where) for spec in grid["x"]] == ["done"] * COUNT + ["missing"]
        plan = order.missing({"page": grid}, where, Estimates.of_store(where), card=False)
        assert [item.spec.id for item in plan.items] == [more.id]
        assert plan.items[0].estimate.basis == f"{COUNT} x another seed"
        [records] = runs.collect({"x": specs}, where=where).values()
        assert len(opened) == (COUNT if turn == 0 else 0)
        opened.clear()
    # a page opens what it shows, once
    assert {record.test["n"] for record in records[:5] for _ in range(2)} == {50}
    assert len(opened) == 5


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_byte_that_flips_later_is_found(filled, suffix):
    where, specs = filled
    runs.load({"": specs}, where)
    where, harmed = again(where), specs[3]
    file = where.find(harmed.id).with_suffix(suffix)
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    # neither size nor time of the content tell; that of the entry does
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.warns(UserWarning, match="is damaged"):
        assert runs.status_of(harmed, where) == "missing"
    assert where.get(harmed) is None and where.find(harmed.id) is None
    assert runs.status_of(specs[4], where) == "done"


def test_a_record_that_goes_or_comes_is_seen(filled):
    where, specs = filled
    runs.load({"": specs}, where)
    where = again(where)
    file = where.find(specs[0].id)
    file.rename(file.with_suffix(".away"))
    assert runs.status_of(specs[0], where) == "missing"
    file.with_suffix(".away").rename(file)
    assert runs.status_of(specs[0], where) == "done"
    file.with_suffix(".npz").unlink()
    with pytest.warns(UserWarning, match="is absent"):
        assert runs.status_of(specs[0], where) == "missing"


def test_what_was_just_written_is_not_trusted(filled, opened, monkeypatch):
    where, specs = filled
    monkeypatch.setattr(index, "TICK", 10**12)
    for _ in range(2):
        assert where.is_done(specs[0].id)
    assert len(opened) == 2 and not (where.private / "index.json").exists()


@pytest.mark.parametrize("harm", ["code", "cut", "gone"])
def test_an_index_that_cannot_be_used_is_made_anew(filled, opened, harm):
    where, specs = filled
    runs.load({"": specs}, where)
    file = where.private / "index.json"
    if harm == "code":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"code": "of old"}))
    elif harm == "cut":
        file.write_text(file.read_text()[:-9])
    else:
        file.unlink()
    opened.clear()
    where = Store(where.published, where.private)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {runs.status_of(spec, where) for spec in specs} == {"done"}
    assert len(opened) == COUNT


def test_two_processes_add_to_one_index(filled, opened):
    where, specs = filled
    here, there = again(where), again(where)
    runs.load({"": specs[:10]}, here)
    runs.load({"": specs[10:]}, there)
    opened.clear()
    assert {runs.status_of(spec, again(where)) for spec in specs} == {"done"}
    assert not opened


def test_a_record_that_changes_under_a_reader_is_no_result(filled):
    where, specs = filled
    runs.load({"": specs}, where)
    record = again(where).get(specs[0])
    record.file.write_text("{}")
    with pytest.raises(RuntimeError, match="has just been damaged"):
        print(record.test)
