"""Fingerprints of data sets: what changes them, what does not, and what records make of them."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_folders import encoded, parquet, put

from lib import paths
from lib.inputs import fingerprint, packed, sources
from lib.inputs.splits import load_splits
from lib.runs import order
from lib.runs.collect import collect, load, with_parents
from lib.runs.estimate import Estimates
from lib.runs.fill import fill
from lib.runs.store import Store
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec

NAMES = ["cat", "dog"]


def write(home, values=range(20), labels=None, names=NAMES) -> None:
    """A parquet data set named set: row r is a grey picture."""
    labels = [value % 2 for value in range(len(values))] if labels is None else labels
    parquet(home / "set/train.parquet", [encoded(value) for value in values], labels, names)


def now(name: str = "set") -> dict:
    return sources.fingerprint_of(name, "label", paths.data_home())


def test_counts_by_hand(home):
    write(home)
    parquet(home / "set/test.parquet", [encoded(9)], [1], NAMES)
    first = now()
    assert first["rows"] == {"train": 20, "test": 1}
    assert first["labels"] == {"train": [10, 10], "test": [0, 1]}
    assert first == now() and len(first["digest"]) == 16


@pytest.mark.parametrize(
    "change, says",
    [
        ({"values": [*range(19), 77]}, "its images or labels are others"),
        ({"values": [1, 0, *range(2, 20)]}, "its images or labels are others"),
        ({"values": range(22)}, "it had {'train': 20} rows and has {'train': 22}"),
        ({"labels": [0] * 10 + [1] * 10}, "its images or labels are others"),
        ({"labels": [0] * 15 + [1] * 5}, "its labels are others"),
        ({"names": ["cat", "cow"]}, "its images or labels are others"),
    ],
)
def test_other_data_have_another_fingerprint(home, change, says):
    write(home)
    times = os.stat(home / "set/train.parquet")
    before = now()
    write(home, **change)
    # a copy that keeps the times: the file looks as old as the one that it replaces
    os.utime(home / "set/train.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint.difference(before, now()) == says


def test_new_pictures_are_read_though_the_file_keeps_its_time(home):
    write(home)
    times = os.stat(home / "set/train.parquet")
    assert int(load_splits(DataSpec(name="set")).train.source.image(3)[0, 0, 0]) == 3
    write(home, values=[*range(3), 200, *range(4, 20)])
    os.utime(home / "set/train.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert int(load_splits(DataSpec(name="set")).train.source.image(3)[0, 0, 0]) == 200


def test_pictures_that_change_are_read_anew_in_one_process(home):
    spec, picture = DataSpec(name="set"), "set/cat/3.png"
    put(home, {f"set/{c}/{n}.png": encoded(n) for c in NAMES for n in range(10)})
    first = load_splits(spec)
    assert load_splits(spec).train.source is first.train.source  # and what is as it was is not
    before = now()
    times = os.stat(home / picture)
    (home / picture).write_bytes(encoded(99))
    os.utime(home / picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert int(load_splits(spec).train.source.image(3)[0, 0, 0]) == 99
    assert fingerprint.difference(before, now()) == "its images or labels are others"
    put(home, {"set/dog/new.png": encoded(5)})
    assert now()["labels"] == {"train": [10, 11]}
    (home / "set/dog/circle").symlink_to(home / "set")
    with pytest.raises(ValueError, match="one and the same folder"):
        load_splits(spec)


def test_a_packed_file_that_changes_is_read_anew_in_one_process(home, tmp_path, monkeypatch):
    away = tmp_path / "away"
    for values in (range(20), range(100, 120)):
        monkeypatch.setenv("MOE_DATA", str(home))
        write(home, values=values)
        opened = sources.sources_of("set", "label", home)
        packed.write(packed.file_of(away, "set"), {"label": opened}, {"train": range(20)})
        expected = now()
        monkeypatch.setenv("MOE_DATA", str(away))
        assert now() == expected
        assert int(load_splits(DataSpec(name="set")).train.source.image(3)[0, 0, 0]) == values[3]


def test_the_place_of_the_data_does_not_matter(home, tmp_path, monkeypatch):
    files = {f"{c}/{n}.png": encoded(n + 100 * (c == "dog")) for c in NAMES for n in range(10)}
    put(home / "set", files)
    before = now()
    shutil.copytree(home, tmp_path / "other")
    monkeypatch.setenv("MOE_DATA", str(tmp_path / "other"))
    assert now() == before
    (tmp_path / "other/set/cat/3.png").write_bytes(encoded(4))
    assert fingerprint.difference(before, now()) == "its images or labels are others"


def test_of_a_large_set_a_sample_is_read(home, monkeypatch):
    monkeypatch.setattr(fingerprint, "SAMPLED_ROWS", 5)  # of 20: rows 0, 4, 9, 14, 19
    write(home)
    before = now()
    write(home, values=[0, 99, *range(2, 20)])
    assert now() == before
    write(home, values=[*range(4), 99, *range(5, 20)])
    assert now() != before


def test_a_packed_copy_keeps_the_fingerprint(home, tmp_path, monkeypatch):
    write(home)
    before = now()
    opened = sources.sources_of("set", "label", home)
    away = tmp_path / "away"
    packed.write(packed.file_of(away, "set"), {"label": opened}, {"train": [1, 2]})
    monkeypatch.setenv("MOE_DATA", str(away))
    assert now() == before and now("mnist5k") is None


# ---------------------------------------------------------------- records

TINY = RunSpec(
    data=DataSpec(name="set", image_size=14),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    train=TrainSpec(epochs=1.0, batch=8),
    threads=1,
)


def test_a_record_is_not_handed_out_for_other_data(home, tmp_path):
    where = Store(tmp_path / "published", tmp_path / "private")
    write(home)
    before = now()
    parent = TINY.but(keep=True)
    child = TINY.but(init=parent, seed=1)
    [record] = collect({"run": [child]}, where=where)["run"]
    assert record.data == before == where.peek(parent.id).data
    write(home, values=[*range(19), 77])
    message = f"data set set is not the one that run {child.id} has seen: its images or labels"
    with pytest.raises(ValueError, match=message):
        collect({"run": [child]}, where=where)
    with pytest.raises(ValueError, match=f"run {parent.id} has seen"):
        collect({"run": [child.but(seed=2)]}, where=where)  # only its parent is there
    assert load({"run": [child]}, where)["run"][0].data == before  # what is there stays
    shutil.rmtree(home / "set")
    [again] = collect({"run": [child]}, where=where)["run"]  # nothing to compare with
    assert again.data == before


def test_no_run_starts_from_one_that_has_seen_other_data(home, tmp_path):
    where = Store(tmp_path / "published", tmp_path / "private")
    write(home)
    parent = TINY.but(keep=True)
    collect({"run": [parent]}, where=where)
    write(home, values=range(100, 120))
    child = TINY.but(init=parent, seed=1)
    plan = order.missing({"page": {"run": [child]}}, where, Estimates.of_store(where), False)
    with ThreadPoolExecutor(1) as executor:
        outcome = fill(plan, 100.0, executor, 1, where, lambda line: None)
    assert outcome.filed == [] and where.peek(child.id) is None
    assert f"data set set is not the one that run {parent.id} has seen" in outcome.failures[0]


def test_a_model_is_not_computed_anew_of_other_data(home, tmp_path):
    where = Store(tmp_path / "published", tmp_path / "private")
    write(home)
    collect({"run": [TINY]}, where=where)  # leaves no weights
    write(home, values=range(100, 120))
    with pytest.raises(ValueError, match=f"not the one that run {TINY.id} has seen"):
        list(with_parents([TINY.but(keep=True)], None, where))
    assert not where.state(TINY.id).exists()
