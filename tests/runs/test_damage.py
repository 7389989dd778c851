"""What lies beside the records is verified before it is trusted: set aside and named, never
deleted."""

from __future__ import annotations

import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib import paths
from lib.extraction.extract import _FiledLayer
from lib.pages import manifest, status
from lib.runs import collect as runs
from lib.runs import states
from lib.runs import store as store_module
from lib.runs.estimate import Estimates
from lib.runs.store import Store
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec
from lib.training import checkpoint, loop
from lib.training.checkpoint import Checkpoint

# 4 steps
SPEC = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    train=TrainSpec(epochs=1.0, batch=16),
    threads=1,
)
OF_OLD = {"spec": {"router": "of old"}}  # entries of a record that other specs made
CHILD = SPEC.but(init=SPEC, train=None)


def file_record(where, entries=None, spec=SPEC, published=False):
    """Files a made-up record whose checksum is right, whatever its entries; None takes one out."""
    content = {
        "id": spec.id,
        "spec": spec.model_dump(mode="json"),
        "semantics": spec.canonical(),
        "status": "ok",
        "weights": {"final": "f"},
        "test": {"top1": 50.0},
    } | (entries or {})
    content = {name: value for name, value in content.items() if value is not None}
    content["checksum"] = store_module.checksum_of(content)
    root = where.published if published else where.private / "records"
    file = root / spec.study / f"{spec.id}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def text_of(spec, **changes):
    """The JSON of a record with a wrong checksum."""
    content = {"id": spec.id, "spec": {}, "status": "ok", "checksum": "c"} | changes
    return json.dumps(content)


# ---- damaged records


def folder(file):
    file.unlink()
    file.mkdir()


DAMAGES = {
    "NaN": lambda file: file.write_text(text_of(SPEC, loss=float("nan"))),
    "-Infinity": lambda file: file.write_text(text_of(SPEC, loss=float("-inf"))),
    "too large a float": lambda file: file.write_text(
        text_of(SPEC).replace('"status"', '"a": 1e999, "status"')
    ),
    "too many digits": lambda file: file.write_text(text_of(SPEC, seed=10**5000 // 10**1000)),
    "deep": lambda file: file.write_text("[" * 200_000),
    "deep inside": lambda file: file.write_text(
        '{"checksum": "c", "a": ' + '{"a":' * 5000 + "1" + "}" * 5001
    ),
    "a list": lambda file: file.write_text("[1, 2]"),
    "null": lambda file: file.write_text("null"),
    "empty": lambda file: file.write_text(""),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe{}"),
    "a folder": folder,
}
# entries with which the checksum is right
WRONG_CONTENTS = {
    "no spec": {"spec": None},
    "spec is a list": {"spec": [1]},
    "spec is a number": {"spec": 3},
    "spec of another run": {"spec": SPEC.but(seed=9).model_dump(mode="json"), "semantics": None},
    "hash of another run": {"semantics": SPEC.but(seed=9).canonical()},
    "no status": {"status": None},
    "failed without a reason": {"status": "failed"},
    "arrays are a list": {"arrays": [1]},
    "large integer": {"test": {"top1": 10**400}},
}


@pytest.mark.parametrize("name", [*DAMAGES, *WRONG_CONTENTS])
def test_damaged_record_is_set_aside_wherever_it_is_read(where, monkeypatch, name):
    monkeypatch.setattr(store_module, "store", lambda: where)
    file = file_record(where, WRONG_CONTENTS.get(name))
    if name in DAMAGES:
        DAMAGES[name](file)
    # what only looks, or reads all, passes over it
    only_whole = ("arrays are a list", "spec of another run")
    assert status.content_of(SPEC.id) == {} or name in only_whole
    manifest.records_now([SPEC.id])
    Estimates.of_store(where).of(SPEC)
    with pytest.warns(UserWarning, match=rf"record {SPEC.id}.json .* is damaged \(.+\)"):
        assert runs.load({"a": [SPEC]}, where) == {"a": [None]}
    [aside] = where.damaged.glob(f"*/{SPEC.id}.json")
    assert os.path.lexists(aside) and not os.path.lexists(file)
    assert runs.status_of(SPEC, where) == "missing" and runs.missing_runs({"a": [SPEC]}, where)
    assert where.find(SPEC.id) is None


def test_a_record_that_may_not_be_read_is_set_aside(where, monkeypatch):
    file, real = file_record(where), type(where.private).read_text

    def read_text(self, **options):  # root, as whom tests may run, may read whatever its mode
        if self == file:
            raise PermissionError(13, "Permission denied")
        return real(self, **options)

    monkeypatch.setattr(type(file), "read_text", read_text)
    assert list(where.facts()) == []
    with pytest.warns(UserWarning, match="damaged .*Permission denied.* moved to"):
        assert runs.load({"a": [SPEC]}, where) == {"a": [None]}
    assert len(list(where.damaged.glob(f"*/{file.name}"))) == 1


def test_sound_record_is_read(where):
    file_record(where)
    assert where.peek(SPEC.id).test == {"top1": 50.0}


def test_a_record_that_cannot_be_moved_is_named_and_stays(where, monkeypatch):
    file = file_record(where, published=True)
    file.write_text("{}")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match="could not be moved to .*Permission denied"):
        assert where.peek(SPEC.id) is None
    assert file.read_text() == "{}" and not list(where.damaged.iterdir())


# ---- records of another version of the specs


@pytest.fixture
def made(monkeypatch):
    """Runs are made up; a seed of `made.bad` fails."""
    made = SimpleNamespace(bad=set())

    def execute(spec, *_):
        head = {"id": spec.id, "spec": spec.model_dump(mode="json")}
        if spec.seed in made.bad:
            return head | {"status": "failed", "error": {"kind": "E", "message": "m"}}, {}
        content = {"status": "ok", "weights": {"final": "f"}, "test": {"top1": 1.0}}
        return head | content, {"test_pred": np.arange(3)}

    monkeypatch.setattr(runs, "execute", execute)
    return made


@pytest.mark.parametrize("old_study", ["foundations", "vimoe"])
@pytest.mark.parametrize("published", [True, False])
def test_record_of_another_version_is_moved_aside_never_written_over(
    where, made, old_study, published
):
    old = file_record(
        where,
        spec=SPEC.but(study=old_study),
        published=True,
        entries=OF_OLD,
    )
    content = old.read_bytes()
    with pytest.warns(UserWarning, match="another version of the specs and is left alone"):
        assert runs.load({"a": [SPEC]}, where) == {"a": [None]}
    assert old.read_bytes() == content
    with pytest.warns(UserWarning, match="another version of the specs; it was moved to"):
        [record] = runs.collect({"a": [SPEC.but(publish=published)]}, where=where)["a"]
    [aside] = where.damaged.glob(f"*/{SPEC.id}.json")
    assert aside.read_bytes() == content and record.test == {"top1": 1.0}
    assert where.find(SPEC.id).is_relative_to(where.published if published else where.private)


def test_a_try_that_fails_leaves_the_record_of_another_version_where_it_is(where, made):
    old = file_record(where, published=True, entries=OF_OLD)
    content = old.read_bytes()
    made.bad.add(0)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="E: m"):
        warnings.simplefilter("ignore")
        runs.collect({"a": [SPEC.but(publish=True)]}, where=where)
    assert old.read_bytes() == content and not where.damaged.exists()


def test_record_whose_methods_have_changed_since_is_left_alone(where, monkeypatch):
    file = file_record(where)
    old = SPEC.id
    monkeypatch.setattr(TrainSpec, "semantics", 99)
    assert SPEC.but().id != old  # a spec keeps the id that it was made with
    with pytest.warns(UserWarning, match="another version of the specs and is left alone"):
        assert where.peek(old) is None
    assert file.is_file()


# ---- kept weights


def flip(file, at=-100):
    data = bytearray(file.read_bytes())
    data[at] ^= 255
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        truncate,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("no weights"),
    ],
    ids=["flipped", "truncated", "empty", "text"],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_damaged_weights_are_set_aside_and_computed_again(where, harm, pooled):
    from concurrent.futures import ThreadPoolExecutor

    [sound] = runs.collect({"a": [CHILD]}, where=where)["a"]
    where.find(CHILD.id).unlink()
    file = where.state(SPEC.id)
    harm(file)
    hurt = file.read_bytes()
    with ThreadPoolExecutor(1) as pool, pytest.warns(UserWarning, match="weights .*moved to"):
        [record] = runs.collect({"a": [CHILD]}, pool if pooled else None, where)["a"]
    assert record.result() == sound.result() and not record.weights["parent_differs"]
    [aside] = where.damaged.glob(f"*/{file.name}")
    assert aside.read_bytes() == hurt


def test_damaged_weights_of_a_model_that_is_asked_for(where):
    model = runs.model_of(SPEC, where)
    flip(where.state(SPEC.id))
    with pytest.warns(UserWarning, match="do not match the SHA-256"):
        again = runs.model_of(SPEC, where)
    assert torch.equal(model.head.weight, again.head.weight)


def test_weights_without_a_hash_are_taken_with_a_word_where_they_differ(where):
    runs.collect({"a": [CHILD]}, where=where)
    file = where.state(SPEC.id)
    old = load_file(file)
    save_file(old, file)  # as an older version wrote them
    where.find(CHILD.id).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [record] = runs.collect({"a": [CHILD]}, where=where)["a"]
    assert not record.weights["parent_differs"]
    old["head.bias"] += 1.0
    save_file(old, file)
    where.find(CHILD.id).unlink()
    with pytest.warns(UserWarning, match="have no SHA-256 of their own: rebuilt .* or damaged"):
        [record] = runs.collect({"a": [CHILD]}, where=where)["a"]
    assert record.weights["parent_differs"] and file.is_file()


def test_weights_are_hashed_once_a_run(where, monkeypatch):
    from lib.inputs import weights

    runs.collect({"a": [SPEC.but(keep=True)]}, where=where)
    hashed, real = [], weights.sha256_state
    monkeypatch.setattr(weights, "sha256_state", lambda state: hashed.append(1) or real(state))
    runs.collect({"a": [CHILD]}, where=where)
    assert len(hashed) == 3  # the parent's, and the run's own at its start and end


def test_a_folder_in_the_place_of_weights(where):
    where.state(SPEC.id).mkdir(parents=True)
    with pytest.warns(UserWarning, match="is a folder where the weights .*moved to"):
        runs.collect({"a": [SPEC.but(keep=True)]}, where=where)
    assert states.read(SPEC, where.states)[1] == where.peek(SPEC.id).weights["final"]


# ---- checkpoints


@pytest.fixture
def broken_off(where, monkeypatch):
    """A run that was interrupted at its third of four steps, with a checkpoint after the second;
    returns the file and the number of steps taken since."""
    steps, real = [0], loop.losses

    def counted(*args):
        if steps[0] == 2:
            raise KeyboardInterrupt
        steps[0] += 1
        return real(*args)

    monkeypatch.setattr(loop, "losses", counted)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: steps[0]))
    with pytest.raises(KeyboardInterrupt):
        runs.collect({"a": [SPEC]}, where=where)
    steps[0] = 100
    return SimpleNamespace(file=where.checkpoint(SPEC.id), steps=lambda: steps[0] - 100)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return runs.collect({"a": [SPEC]}, where=Store(folder / "p", folder / "q"))["a"][0].result()


def change(file, old=False, **changes):
    """Writes a checkpoint again with other entries and the right SHA-256; old: without any."""
    content = torch.load(file, weights_only=True) | changes
    if old:
        content = {name: content[name] for name in content.keys() - {"sha256", "origin", "resumed"}}
    else:
        content["sha256"] = checkpoint._sha256(content)
    torch.save(content, file)


def other_shape(file):
    model = torch.load(file, weights_only=True)["model"]
    change(file, model=model | {"head.bias": torch.zeros(7)})


def other_moments(file):
    optim = torch.load(file, weights_only=True)["optim"]
    optim["state"][0]["exp_avg"] = torch.zeros(1, 2)
    change(file, optim=optim)


def other_run(file):
    origin = torch.load(file, weights_only=True)["origin"]
    change(file, origin=origin | {"id": "0" * 16})


def flip_values(file):
    """Flips 64 bytes of the first weights."""
    data, value = file.read_bytes(), torch.load(file, weights_only=True)["model"]["pos_embed"]
    at = data.index(value.numpy().tobytes())
    file.write_bytes(data[:at] + bytes(byte ^ 255 for byte in data[at : at + 64]) + data[at + 64 :])


def flip_values_of_an_old_one(file):
    change(file, old=True)
    flip_values(file)


@pytest.mark.parametrize(
    "harm, fault",
    [
        (flip_values, "does not match its SHA-256"),
        (flip_values_of_an_old_one, "is damaged in "),
        (truncate, "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (folder, "cannot be read"),
        (lambda file: torch.save([1], file), "holds no state"),
        (other_run, "was made with another id"),
        (other_shape, "does not fit the run .*head.bias"),
        (other_moments, "does not fit the run .*exp_avg"),
        (lambda file: change(file, step=4), "does not fit the run .*step 4, of 4"),
        (lambda file: change(file, step=-1), "does not fit the run .*step -1, of 4"),
        (lambda file: change(file, step="two"), "does not fit the run .*step 'two'"),
        (lambda file: change(file, progress={}), "does not fit the run .*progress"),
    ],
)
def test_unfit_checkpoint_is_set_aside_and_the_run_starts_anew(
    where, broken_off, unbroken, harm, fault
):
    harm(broken_off.file)
    with pytest.warns(UserWarning, match=rf"{SPEC.id}.pt {fault}.* moved to .*starts anew"):
        [record] = runs.collect({"a": [SPEC]}, where=where)["a"]
    assert record.result() == unbroken and broken_off.steps() == 4
    assert len(list(where.damaged.glob(f"*/{SPEC.id}.pt"))) == 1
    assert "resumed" not in record.content


def test_checkpoint_of_other_code_is_resumed_and_the_record_says_so(where, broken_off, unbroken):
    origin = torch.load(broken_off.file, weights_only=True)["origin"]
    change(broken_off.file, origin=origin | {"code": "old", "torch": "1.0"})
    [record] = runs.collect({"a": [SPEC]}, where=where)["a"]
    assert record.result() == unbroken and broken_off.steps() == 2
    differs = {"code": ["old", record.code], "torch": ["1.0", record.environment["torch"]]}
    assert record.resumed == [{"step": 2, "differs": differs}]


def test_checkpoint_of_here_is_resumed_without_a_word(where, broken_off, unbroken):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [record] = runs.collect({"a": [SPEC]}, where=where)["a"]
    assert record.result() == unbroken and broken_off.steps() == 2
    assert "resumed" not in record.content


def test_checkpoint_of_an_older_version_is_resumed_with_a_word(where, broken_off, unbroken):
    change(broken_off.file, old=True)
    with pytest.warns(UserWarning, match="written by an older version .* it is resumed"):
        [record] = runs.collect({"a": [SPEC]}, where=where)["a"]
    assert record.result() == unbroken and broken_off.steps() == 2
    assert record.resumed[0]["differs"]["code"] == [None, record.code]


@pytest.mark.parametrize("now, is_read", [("a", True), (None, True), ("b", False)])
def test_checkpoint_of_other_data_is_set_aside(tmp_path, now, is_read):
    file = tmp_path / "checkpoints" / "run.pt"
    Checkpoint(file, {"id": "run", "data": {"digest": "a"}}).write({"step": 1})
    later = Checkpoint(file, {"id": "run", "data": now and {"digest": now}})
    if is_read:
        assert later.read()["step"] == 1 and later.resumed == []
    else:
        with pytest.warns(UserWarning, match="run.pt was made with another data; .* moved to"):
            assert later.read() is None


def test_an_estimate_trusts_no_checkpoint_and_moves_none(broken_off):
    assert Checkpoint(broken_off.file).step() == 2
    truncate(broken_off.file)
    assert Checkpoint(broken_off.file).step() == 0 and broken_off.file.is_file()


def test_full_disk_costs_the_checkpoint_alone(where, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(checkpoint, "WRITE_SHARE", -1)
    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.warns(UserWarning, match="the checkpoint at step 1 was not written"):
        [record] = runs.collect({"a": [SPEC]}, where=where)["a"]
    assert record.status == "ok"


@pytest.mark.parametrize("part", ["weights", "report"])
@pytest.mark.parametrize("old", [False, True])
def test_extracted_layer_is_verified(tmp_path, monkeypatch, part, old):
    from lib.extraction import extract

    monkeypatch.setattr(extract, "layer_like", lambda *_: torch.nn.Linear(2, 2))
    filed = _FiledLayer(tmp_path / "checkpoints" / "run.pt", "blocks.0.mlp")
    assert filed.read(None, None) is None
    layer, report = torch.nn.Linear(2, 2), {"experts": 2, "share": 0.5}
    filed.write(layer, report)
    if old:
        filed.report.write_text(json.dumps(report))
    again, same = filed.read(None, None)
    assert same == report and torch.equal(again.weight, layer.weight)
    if part == "weights":
        flip(filed.weights, -2)
    else:
        filed.report.write_text(filed.report.read_text().replace("0.5", "0.6"))
    if old:  # nothing says what it was
        assert filed.read(None, None) is not None
        return
    with pytest.warns(UserWarning, match="layer run.pt.blocks.0.mlp.safetensors cannot be used"):
        assert filed.read(None, None) is None
    assert not filed.weights.exists() and len(list(tmp_path.glob("damaged/*/*"))) == 2


# ---- the helper


def test_a_file_on_another_disk_is_copied_and_then_removed(tmp_path, monkeypatch):
    import errno

    def cross(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    file = tmp_path / "file"
    file.write_text("content")
    monkeypatch.setattr(os, "replace", cross)
    with pytest.warns(UserWarning, match="it is bad; it was moved to .* and goes on"):
        paths.set_aside([file, tmp_path / "absent"], tmp_path / "damaged", "it is bad", "goes on")
    [aside] = (tmp_path / "damaged").glob("*/file")
    assert aside.read_text() == "content" and not file.exists()
