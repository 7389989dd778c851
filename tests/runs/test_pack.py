"""Packed runs: carried out without the repository, killed, started again, merged; damage."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_folders import encoded, parquet, put

from lib.__main__ import main
from lib.pages import contents, parameters, profiles
from lib.runs import away as away_module
from lib.runs import merge as merging
from lib.runs import record_files
from lib.runs.collect import collect, missing_runs
from lib.runs.pack import _pinned, pack
from lib.runs.store import Record, Store
from lib.spec import BackboneSpec, DataSpec, MaskSpec, MoESpec, RunSpec, TrainSpec, recipes

PARENT = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    train=TrainSpec(epochs=1.0, batch=32),
    threads=1,
)
CHILD = PARENT.but(init=PARENT, moe=MoESpec(layers=1, experts=2), publish=True, study="moe")
MASKED = recipes.pretrained(PARENT, MaskSpec(width=8, depth=1, heads=2), epochs=1.0, lr=1e-3)
GRID = {"dense": [PARENT], "moe": [CHILD], "pretraining": [MASKED]}


# every Python that has this on its path imports it first
BARE = """
from importlib.machinery import PathFinder

finds = PathFinder.find_spec
absent = ("datasets", "mlxtend", "h5py", "pandas", "matplotlib", "IPython", "papermill")

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in absent else finds(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
"""


def away(folder: Path, *options: str) -> subprocess.Popen:
    """Starts the script with nothing of this project on its path and in its environment, and
    without the packages that `--wheels` does not bring."""
    bare = folder.parent / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "sitecustomize.py").write_text(BARE)
    passed = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_WAIT_POLICY")
    env = {name: os.environ[name] for name in passed if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", folder / "run.py", "--settle", "0", *options],
        cwd="/",
        env=env | {"PYTHONPATH": str(bare)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_packed_runs_are_those_of_collect(tmp_path, where):
    specs = missing_runs(GRID, where)
    assert specs[0].id == PARENT.id and specs[0].keep
    files = pack(specs, tmp_path / "packed", 100_000, where=where)
    assert len(files) > 3 and all(file.stat().st_size <= 100_000 for file in files)
    there = tmp_path / "there"
    shutil.move(tmp_path / "packed", there)

    process = away(there, "--workers", "1")
    while not list(there.glob(f"unpacked-*/states/{PARENT.id}.safetensors")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the run that follows the parent, too
    process.communicate()
    assert not list((there / "records").glob("*")) or len(record_ids(there)) < 3

    process = away(there, "--workers", "2")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert f"runs to do, code in {there}/unpacked-" in said and "failed: none" in said
    assert record_ids(there) == {spec.id for spec in specs}
    assert ": loss " in said  # masked pretraining knows no classes

    merged = merging.merge(sorted((there / "records").iterdir()), GRID, where)
    assert set(merged.filed) == {spec.id for spec in specs} and merged.missing == []
    assert merged.refused == []
    computed = collect(GRID, where=Store(tmp_path / "results", tmp_path / "cache"))
    for name, records in collect(GRID, where=where).items():
        for mine, theirs in zip(records, computed[name], strict=True):
            assert mine.result() == theirs.result()
            assert mine.file.parent.name == theirs.file.parent.name
    assert where.find(CHILD.id).is_relative_to(where.published)
    assert collect({"moe": [CHILD]}, where=where)["moe"][0].weights["parent_differs"] is False


def pictures(home: Path) -> None:
    for split in ("train", "test"):
        for c in ("ä", "b"):
            files = {f"own rooms/{split}/{c}/{n}.png": encoded(9 * n, (16, 12)) for n in range(15)}
            put(home, files)


def tables(home: Path) -> None:
    parquet(
        home / "own rooms/train.parquet", [encoded(n) for n in range(40)], [0, 1] * 20, ["a", "b"]
    )


@pytest.mark.parametrize("data_set", [pictures, tables])
def test_runs_of_a_folder_of_ones_own_are_packed(tmp_path, home, where, data_set):
    data_set(home)
    run = PARENT.but(data=DataSpec(name="own rooms", image_size=14))
    both = {"own": [run], "mnist": [PARENT]}
    pack([run, PARENT], tmp_path / "packed", 10**7, where=where)
    there = tmp_path / "packed"
    process = away(there, "--workers", "1")
    said, _ = process.communicate()
    assert process.returncode == 0 and "failed: none" in said, said
    merged = merging.merge(sorted((there / "records").iterdir()), both, where)
    assert set(merged.filed) == {run.id, PARENT.id} and merged.missing == merged.refused == []
    [record] = collect({"own": [run]}, where=where)["own"]  # is not refused: it has seen these data
    [computed] = collect({"own": [run]}, where=Store(tmp_path / "r", tmp_path / "c"))["own"]
    assert record.result() == computed.result() and record.data is not None


def record_ids(there: Path) -> set[str]:
    names = [name for file in (there / "records").iterdir() for name in record_files.read(file)]
    return {Path(name).stem for name in names if name != record_files.PLANNED}


def test_weights_that_are_there_travel_instead_of_their_run(tmp_path, where):
    [parent] = collect({"dense": [PARENT.but(keep=True)]}, where=where)["dense"]
    specs = missing_runs({"moe": [CHILD]}, where)
    assert [spec.id for spec in specs] == [CHILD.id]
    *parts, script = pack(specs, tmp_path / "packed", 100_000, where=where)
    assert script.name == "run.py"
    with zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        weights = archive.read(f"states/{PARENT.id}.safetensors")
        assert weights == where.state(PARENT.id).read_bytes()
        assert [spec["seed"] for spec in json.loads(archive.read("specs.json"))] == [0]
        endings = {Path(name).suffix for name in archive.namelist() if not name.endswith("/")}
    assert endings == {".py", ".json", ".npz", ".safetensors"}  # no pickles
    there = tmp_path / "packed"
    process = away(there, "--workers", "1")
    said, _ = process.communicate()
    assert process.returncode == 0 and "1 of 1 runs to do" in said, said
    assert record_ids(there) == {CHILD.id}  # the record of its parent came along, and stays there
    merging.merge(sorted((there / "records").iterdir()), GRID, where)
    assert where.peek(CHILD.id).weights["parent"] == parent.weights["final"]


def test_packages_that_only_some_runs_need_are_looked_for_before_any_work(monkeypatch):
    monkeypatch.setattr(away_module.importlib.util, "find_spec", lambda name: None)
    away_module._check_packages([PARENT, CHILD])
    with pytest.raises(SystemExit, match="need the package grad-cam"):
        away_module._check_packages([PARENT, CHILD.but(cam_probe=True)])


def test_wheels_are_of_all_that_is_imported_but_torch():
    names = [pin.partition("==")[0] for pin in _pinned("3.12")]
    assert {"timm", "pydantic", "pydantic_core", "numpy", "scipy", "tqdm"} <= {
        name.replace("-", "_") for name in names
    }
    assert len(names) == len(set(names))
    assert not any(name.startswith(("torch", "nvidia", "triton", "cuda")) for name in names)


def test_the_commands(tmp_path, where, monkeypatch, capsys):
    monkeypatch.setenv("MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parameters, "key_of", lambda name: name)
    monkeypatch.setattr(profiles, "plan", lambda key, profile: GRID)
    monkeypatch.setattr(profiles, "has_profile", lambda key, profile: True)
    monkeypatch.setattr(contents, "in_book", lambda: ["a/one"])
    out = tmp_path / "packed"
    assert main(["pack", "a/one", "-o", str(out), "--part", "lots"]) == 2
    assert "--part lots: give a size such as 60M, 500k or 1G" in capsys.readouterr().err
    assert main(["pack", "a/one", "-o", str(out), "--part", "60"]) == 2
    assert "--part 60: give a size such as 60M" in capsys.readouterr().err and not out.exists()
    assert main(["pack", "a/one", "-o", __file__]) == 2
    assert "test_pack.py is a file: give a new folder" in capsys.readouterr().err
    assert main(["pack", "a/one", "-o", str(out), "--part", "100k"]) == 0
    assert "3 runs in " in capsys.readouterr().out
    assert max(file.stat().st_size for file in out.iterdir()) == 100_000
    record_files.append(tmp_path / "out", finished(where), [PARENT.id, CHILD.id])
    bundle = str(tmp_path / "out" / "records-000.moe")
    assert main(["merge", bundle]) == 0
    assert f"1 record is there; still missing: {CHILD.id}" in capsys.readouterr().out
    record_files.append(tmp_path / "out", finished(where, seed=9), [])
    assert main(["merge", bundle]) == 1  # once the others are filed
    said = capsys.readouterr()
    assert f"1 record is there; still missing: {CHILD.id}\n" in said.out
    stranger = f"holds runs that no page of this profile plans: {PARENT.but(seed=9).id}. Give the"
    assert said.err.startswith(f"error: {bundle} {stranger}")
    flip(Path(bundle), -1)
    assert main(["merge", bundle]) == 1
    said = capsys.readouterr()
    assert "0 records are there; still missing: none that is known of\n" in said.out
    assert "records-000.moe is damaged" in said.err
    assert main(["merge", bundle + "x"]) == 2
    assert "records-000.moex is not there" in capsys.readouterr().err
    assert main(["merge", __file__]) == 2
    assert "test_pack.py holds no packed records: give the files" in capsys.readouterr().err


# ---- as many at a time as fit


class FakeProcess:
    """Stands for the process of a run: those of `large` end out of memory if they had company."""

    large: frozenset[int] = frozenset()
    active: list[FakeProcess] = []
    log: list[tuple[int, int]] = []  # seed, and how many ran when it started

    def __init__(self, command, **_):
        run = command[command.index("--run") + 1]
        [self.spec] = [spec for spec in OF_SEEDS if spec.id == run]
        self.polls, self.returncode = 0, None
        FakeProcess.active.append(self)
        self.most = 0
        FakeProcess.log.append((self.spec.seed, len(FakeProcess.active)))

    def poll(self):
        self.polls += 1
        self.most = max(self.most, len(FakeProcess.active))
        if self.polls < 4:
            return None
        FakeProcess.active.remove(self)
        head = {"id": self.spec.id, "spec": self.spec.model_dump(mode="json")}
        body = {"status": "ok", "test": {"top1": 50.0}}
        if self.spec.seed in self.large and self.most > 1:
            body = {"status": "failed", "error": {"kind": "OutOfMemoryError", "message": "CUDA"}}
        away_module.store().put(head | body, {}, self.spec)
        self.returncode = int(body["status"] != "ok")
        return self.returncode


OF_SEEDS = [PARENT.but(seed=seed) for seed in range(4)]


@pytest.fixture
def queue(tmp_path, where, monkeypatch):
    monkeypatch.setattr(away_module, "store", lambda: where)
    monkeypatch.setattr(away_module.subprocess, "Popen", FakeProcess)
    monkeypatch.setattr(away_module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(FakeProcess, "log", [])
    return away_module.Queue(OF_SEEDS, tmp_path / "records", workers=3, settle=0.0)


def test_a_run_that_does_not_fit_is_tried_alone(queue, monkeypatch, capsys):
    monkeypatch.setattr(FakeProcess, "large", frozenset({1}))
    queue.carry_out()
    assert queue.failed == [] and FakeProcess.log[-1] == (1, 1)
    assert max(beside for _, beside in FakeProcess.log) == 3
    lines = capsys.readouterr().out.splitlines()
    assert sum("did not fit" in line for line in lines) == 1 and "[4/4]" in lines[-1]
    assert {Path(n).stem for n in record_files.read(queue.bundles / "records-000.moe")} == {
        "planned",
        *(spec.id for spec in OF_SEEDS),
    }


def test_a_run_whose_parent_is_not_there_is_said_to_fail(queue, capsys):
    queue.specs = [CHILD]
    queue.carry_out()
    assert queue.failed == [CHILD.id] and FakeProcess.log == []
    assert "[0/1]" in (out := capsys.readouterr().out) and "left no weights" in out


def test_no_run_is_started_beside_others_where_none_more_fits(queue, monkeypatch):
    monkeypatch.setattr(
        away_module.Queue, "_free_bytes", lambda self: 100.0 - 55.0 * len(self.running)
    )
    queue.carry_out()
    assert queue.failed == [] and FakeProcess.log == [(seed, 1) for seed in range(4)]


# ---- files of records, and damage


def finished(where: Store, seed: int = 0, spec: RunSpec = PARENT) -> Record:
    spec = spec.but(seed=seed)
    content = {"id": spec.id, "spec": spec.model_dump(mode="json"), "status": "ok"}
    content |= {"weights": {"final": "f"}, "test": {"top1": 50.0}}
    return where.put(content, {"test_pred": np.random.default_rng(seed).random(2000)}, spec)


def test_files_of_records_stay_below_the_limit(tmp_path, where, monkeypatch):
    monkeypatch.setattr(record_files, "LIMIT", 40_000)  # an array has 15,000
    for seed in range(5):
        record_files.append(tmp_path / "out", finished(where, seed), ["a"])
    files = sorted((tmp_path / "out").iterdir())
    assert [len(record_files.read(file)) for file in files] == [5, 5, 3]
    assert all(file.stat().st_size <= 40_000 for file in files)


@pytest.mark.parametrize("place", [0, 64, 1000, -1])
def test_a_flipped_byte_in_a_file_of_records_is_refused(tmp_path, where, place):
    record_files.append(tmp_path / "out", finished(where), [PARENT.id])
    file = tmp_path / "out" / "records-000.moe"
    flip(file, place)
    other = Store(tmp_path / "results", tmp_path / "cache")
    merged = merging.merge([file], GRID, other)
    assert merged.filed == merged.missing == [] and other.find(PARENT.id) is None
    [why] = merged.refused
    assert "records-000.moe is damaged" in why and "copy it again. Nothing of it is filed" in why


def test_what_the_plan_does_not_hold_is_refused_and_the_rest_filed(tmp_path, where):
    for seed in (9, 0, 8):
        record_files.append(tmp_path / "out", finished(where, seed), [PARENT.id])
    file = tmp_path / "out" / "records-000.moe"
    other = Store(tmp_path / "results", tmp_path / "cache")
    merged = merging.merge([file], GRID, other)
    assert merged.filed == [PARENT.id] and merged.missing == []
    [why] = merged.refused
    strangers = ", ".join(sorted(PARENT.but(seed=seed).id for seed in (8, 9)))
    assert why.startswith(f"{file} holds runs that no page of this profile plans: {strangers}. ")
    assert [file.stem for file in other.private.glob("records/*/*.json")] == [PARENT.id]
    assert other.peek(PARENT.id).result() == finished(where).result()
    before = other.find(PARENT.id).read_bytes()
    assert merging.merge([file], GRID, other) == merged  # again, and nothing changes
    assert other.find(PARENT.id).read_bytes() == before


def test_of_several_files_the_sound_ones_are_filed(tmp_path, where, monkeypatch):
    monkeypatch.setattr(record_files, "LIMIT", 1)  # a file for each record
    seeds, out = range(3), tmp_path / "out"
    grid = {"dense": [PARENT.but(seed=seed) for seed in seeds]}
    for seed in seeds:
        record_files.append(out, finished(where, seed), [spec.id for spec in grid["dense"]])
    record_files.append(out, finished(where, seed=9), [])
    files = sorted(out.iterdir())
    whole = files[0].read_bytes()
    flip(files[0], 1000)
    other = Store(tmp_path / "results", tmp_path / "cache")
    merged = merging.merge(files, grid, other)
    assert merged.filed == [grid["dense"][seed].id for seed in (1, 2)]
    assert merged.missing == [PARENT.id]
    damaged, stranger = merged.refused
    assert damaged.startswith(f"{files[0]} is damaged")
    assert stranger.startswith(f"{files[3]} holds runs that no page")
    # copied again, all of it is there
    files[0].write_bytes(whole)
    merged = merging.merge(files, grid, other)
    assert merged.filed == [spec.id for spec in grid["dense"]] and merged.missing == []
    assert merged.refused == [stranger]
    # a name that is mistyped is no damage: nothing is filed before it is right
    empty = Store(tmp_path / "results of none", tmp_path / "cache of none")
    with pytest.raises(ValueError, match=r"records-007.moe is not there"):
        merging.merge([*files, out / "records-007.moe"], grid, empty)
    assert empty.find(PARENT.id) is None


def test_a_damaged_record_does_not_keep_back_the_others_of_its_file(tmp_path, where):
    for seed in (0, 1, 2):
        record_files.append(tmp_path / "out", finished(where, seed), [])
    file = tmp_path / "out" / "records-000.moe"
    runs = [PARENT.but(seed=seed) for seed in (0, 1, 2)]
    members = record_files.read(file)
    members[f"{runs[0].id}.json"] = b"{"
    del members[f"{runs[1].id}.json"]  # its arrays alone are no record
    members["../notes.txt"] = b"of somebody"
    file.write_bytes(record_files._bundle(members))
    other = Store(tmp_path / "results", tmp_path / "cache")
    merged = merging.merge([file], {"dense": runs}, other)
    assert merged.filed == [runs[2].id] and len(merged.refused) == 3
    assert (
        sum(f"{file} holds '../notes.txt', which is no file" in why for why in merged.refused) == 1
    )
    for run in runs[:2]:
        assert sum(f"{file}, run {run.id}: " in why for why in merged.refused) == 1
        assert not list(tmp_path.glob(f"results/**/{run.id}*"))
        assert not list(tmp_path.glob(f"cache/**/{run.id}*"))


def test_a_record_under_the_name_of_another_run_is_refused(tmp_path, where):
    record = finished(where)
    false = record.file.with_name(f"{CHILD.id}.json")
    false.write_bytes(record.file.read_bytes())
    record_files.append(tmp_path / "out", Record(CHILD, record.content, false), [CHILD.id])
    other = Store(tmp_path / "results", tmp_path / "cache")
    [why] = merging.merge([tmp_path / "out" / "records-000.moe"], GRID, other).refused
    assert f"records-000.moe, run {CHILD.id}: " in why and "it holds run" in why


def test_a_damaged_record_is_to_be_copied_again(tmp_path, where):
    record_files.append(tmp_path / "out", finished(where), [PARENT.id])
    file = tmp_path / "out" / "records-000.moe"
    members = record_files.read(file)
    members[f"{PARENT.id}.json"] = members[f"{PARENT.id}.json"].replace(b'"ok"', b'"OK"')
    file.write_bytes(record_files._bundle(members))  # whole as a file, not as a record
    other = Store(tmp_path / "results", tmp_path / "cache")
    [why] = merging.merge([file], GRID, other).refused
    assert "checksum" in why and ". Nothing of it is filed: copy" in why
    # not where a folder lies that is gone, nor that anything is computed here
    assert "moved" not in why and "computed again" not in why


def test_a_record_keeps_the_study_that_packed_it(tmp_path, where):
    record_files.append(tmp_path / "out", finished(where), [PARENT.id])
    other = Store(tmp_path / "results", tmp_path / "cache")
    plan = {"dense": [PARENT.but(study="vimoe")]}  # a page that comes first
    merged = merging.merge([tmp_path / "out" / "records-000.moe"], plan, other)
    assert merged == ([PARENT.id], [], [])
    assert other.peek(PARENT.id).spec.study == PARENT.study != "vimoe"


def test_what_is_missing_is_said(tmp_path, where):
    record_files.append(tmp_path / "out", finished(where), [PARENT.id, CHILD.id])
    other = Store(tmp_path / "results", tmp_path / "cache")
    answer = merging.merge([tmp_path / "out" / "records-000.moe"], GRID, other)
    assert answer == ([PARENT.id], [CHILD.id], [])


def test_a_damaged_or_absent_part_is_refused_by_name(tmp_path, where):
    pack([PARENT], tmp_path / "packed", 100_000, where=where)
    flip(tmp_path / "packed" / "part-001", 500)
    process = away(tmp_path / "packed")
    said, _ = process.communicate()
    assert process.returncode == 1 and "part-001 is damaged" in said
    (tmp_path / "packed" / "part-000").unlink()
    process = away(tmp_path / "packed")
    assert "part-000 is not in" in process.communicate()[0] and process.returncode == 1
    with pytest.raises(ValueError, match="is not empty"):
        pack([PARENT], tmp_path / "packed", 100_000, where=where)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
