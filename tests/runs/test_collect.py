"""Specs as names of records, the store, and `collect`. Most runs here are made up: who computes
what, and when, counts."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from pydantic import ValidationError

from lib.runs import collect as runs
from lib.runs.store import Store
from lib.spec import BackboneSpec, DataSpec, DropSpec, MaskSpec, MoESpec, RunSpec, TrainSpec

TINY = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    threads=1,
)


ALL = MoESpec(router="all", experts=2, top_k=2, balance="none")


@pytest.mark.parametrize("place", ["test.loss", "memory.steps.1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_whose_numbers_are_not_finite_is_filed_as_failed(where, monkeypatch, place, value):
    from lib.measure import probes
    from lib.training import evaluate

    evaluated, probed = evaluate.evaluate, probes.probed

    def evaluate_badly(model, split, spec, *rest, **named):
        result = evaluated(model, split, spec, *rest, **named)
        is_bad = spec.seed == 1 and place == "test.loss"
        return dataclasses.replace(result, loss=value) if is_bad else result

    def probe_badly(inputs):
        result = probed(inputs)
        if inputs.spec.seed == 1 and place != "test.loss":
            result.entries["memory"] = {"steps": [1.0, value]}
        return result

    monkeypatch.setattr(evaluate, "evaluate", evaluate_badly)
    monkeypatch.setattr(probes, "probed", probe_badly)
    bad, good = TINY.but(seed=1, keep=True), TINY.but(seed=2)
    with pytest.raises(RuntimeError, match=rf"run {bad.id}: NotFinite: {place} is {value}, and a"):
        runs.collect({"runs": [bad, good]}, where=where)
    assert where.peek(bad.id).status == "failed" and where.is_done(good.id)
    assert not where.state(bad.id).exists()


@pytest.fixture
def made(monkeypatch):
    """Runs are made up instead of computed. Returns the list of seeds computed so far; seeds in
    `made.bad` fail."""

    class Made(list):
        def __init__(self):
            super().__init__()
            self.bad: set[int] = set()
            self.version = 0  # of the weights that come out

    log = Made()

    def execute(spec, states, checkpoint=None):
        log.append(spec.seed)
        head = {"id": spec.id, "spec": spec.model_dump(mode="json")}
        where = Store(Path("nowhere"), Path(states).parent)
        if spec.init is not None and not where.state(spec.init.id).is_file():
            return head | {
                "status": "failed",
                "error": {"kind": "FileNotFoundError", "message": "no parent"},
            }, {}
        if spec.seed in log.bad:
            reason = {"kind": "ValueError", "message": f"seed {spec.seed}\n is bad"}
            return head | {"status": "failed", "error": reason}, {}
        if spec.keep:
            time.sleep(0.05)  # a child that does not wait for its parent would now find nothing
            where.states.mkdir(parents=True, exist_ok=True)
            where.state(spec.id).write_text(str(log.version))
        body = {
            "status": "ok",
            "test": {"top1": float(spec.seed)},
            "weights": {"final": f"{spec.seed}/{log.version}"},
        }
        if spec.init is not None:
            body["weights"]["parent"] = f"{spec.init.seed}/{where.state(spec.init.id).read_text()}"
        return head | body, {"test_pred": np.arange(spec.seed)}

    monkeypatch.setattr(runs, "execute", execute)
    return log


def of(*seeds: int, **more) -> list[RunSpec]:
    return [TINY.but(seed=seed, **more) for seed in seeds]


# ---- the name of a run


def test_id_is_stable():
    # Pinned: these change only with a deliberate bump of a `semantics` number, since committed
    # records go by them.
    assert RunSpec().id == "a3674d0c3d7f1371"
    assert (
        TINY.but(moe=MoESpec(layers=2), train=TrainSpec(epochs=1.0), seed=3).id
        == "eb41e2699f7d0ffe"
    )


def test_id_covers_what_decides_a_result_and_nothing_else():
    same = [
        TINY.but(study="vimoe"),
        TINY.but(keep=True),
        TINY.but(publish=True),
        TINY.but(data={"augment": "none"}),
    ]
    assert {spec.id for spec in same} == {TINY.id}
    other = [
        TINY.but(seed=1),
        TINY.but(dtype="bfloat16"),
        TINY.but(threads=2),
        TINY.but(data={"train": 65}),
        TINY.but(backbone={"width": 32}),
        TINY.but(moe=MoESpec()),
        TINY.but(train=TrainSpec()),
        TINY.but(train=TrainSpec(lr=1e-3)),
        TINY.but(init=TINY),
    ]
    assert len({TINY.id, *(spec.id for spec in other)}) == 10
    assert TINY.but(init=TINY.but(keep=True, study="vimoe")).id == TINY.but(init=TINY).id
    assert (
        TrainSpec(epochs=3) == TrainSpec(epochs=3.0)
        and TrainSpec(epochs=3).id == TrainSpec(epochs=3.0).id
    )


def test_new_field_keeps_ids_and_new_semantics_changes_them():
    class Wider(DataSpec):
        blur: float = 0.0

    class Changed(DataSpec):
        semantics: ClassVar[int] = 2

    assert Wider().id == DataSpec().id and Wider(blur=1.0).id != DataSpec().id
    assert Changed().id != DataSpec().id
    # Also for a part that stands at its default: its meaning has changed for this run as well.
    run = RunSpec()
    assert run.model_copy(update={"data": Changed()}).id != run.id


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MoESpec(experts=2, top_k=4), "top_k=4 needs at least 4 experts, got experts=2"),
        (lambda: MoESpec(capacity_factor=1.0), "router='image' does not take it"),
        (lambda: MoESpec(router="all", top_k=8, balance="loss_free"), "router='all' has none"),
        (lambda: BackboneSpec(width=10, heads=3), "heads=3 must divide width=10"),
        (lambda: BackboneSpec(drop_path=1.0), "drop_path\n.*less than 1"),
        (lambda: TrainSpec(lr=float("nan")), "lr\n.*finite"),
        (lambda: TrainSpec(epochs="3"), "epochs\n.*valid number"),
        (lambda: DataSpec(train=True), "train\n.*valid integer"),
        (lambda: RunSpec(sed=1), "sed\n.*not permitted"),
        (lambda: RunSpec(init=TINY), "same backbone"),
    ],
)
def test_bad_values_are_refused_by_name(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"moe": MoESpec(layers=3)},
            "layers=3 is beyond the depth: VisionTransformer has 2 blocks, valid is 1 to 2",
        ),
        ({"backbone": {"patch": 5}}, "image_size=28 is not a multiple of the patch size 5"),
        (
            {"backbone": {"name": "vit_tiny_patch16_242"}},
            "'vit_tiny_patch16_242' is not a timm model; near it: vit_tiny_patch16_224, .*lists",
        ),
        (
            {"backbone": {"name": "resnet18", "heads": None, "width": None, "depth": None}},
            "resnet18 does not take patch_size",
        ),
        (
            {"init": TINY, "data": {"image_size": 27}},
            "image_size=27 is not a multiple of the patch size 7",
        ),
        (
            {"backbone": BackboneSpec(name="resnet18"), "moe": MoESpec()},
            "ResNet has no block MLP: a timm ViT",
        ),
        (
            {
                "backbone": BackboneSpec(name="convnext_atto"),
                "data": {"image_size": 32},
                "train": TrainSpec(mask=MaskSpec(width=16, heads=2)),
            },
            "ConvNeXt cannot be pretrained with masks",
        ),
        (
            {
                "backbone": BackboneSpec(name="convnext_tiny"),
                "data": {"image_size": 32},
                "moe": MoESpec(router="token", experts=4, members=2),
            },
            "ConvNeXt cannot be an ensemble",
        ),
        (
            {"init": TINY.but(moe=ALL), "moe": ALL, "drop": DropSpec(score="load")},
            "expert pruning needs a linear router",
        ),
        (
            {"moe": MoESpec(router="token", experts=4, capacity_factor=1e-9)},
            r"capacity_factor=1e-09 lets each of 4 experts serve less than one of the \d+ tokens",
        ),
        (
            {"backbone": {"width": 10, "heads": None}},
            "vit_tiny_patch16_224 does not take .*embed_dim=10",
        ),
        (
            {"backbone": {"patch": 1}, "data": {"image_size": 65536}},
            "VisionTransformer does not run on image_size=65536",
        ),
        (
            {"train": TrainSpec(mask=MaskSpec(ratio=0.01, width=16, heads=2))},
            "mask ratio=0.01 hides none of 16 patches",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(where, made, change, message):
    with pytest.raises(ValueError, match=message):
        runs.collect({"good": of(1), "bad": [TINY.but(**change)]}, where=where)
    assert made == [] and not where.private.exists()


def test_a_device_that_is_not_there_is_refused_where_something_has_to_be_computed(
    where, made, monkeypatch
):
    here = {"card": False}
    monkeypatch.setattr("torch.cuda.is_available", lambda: here["card"])
    [spec] = of(2, device="cuda")
    with pytest.raises(
        ValueError, match="planned for device='cuda' and this machine has none: give device='cpu'"
    ):
        runs.collect({"a": [spec]}, where=where)
    assert made == []
    here["card"] = True
    runs.collect({"a": [spec]}, where=where)
    here["card"] = False
    # a record needs no card
    assert runs.collect({"a": [spec]}, where=where)["a"][0].test["top1"] == 2 and made == [2]
    with pytest.raises(ValueError, match="this machine has none"):
        runs.model_of(spec, where)


# ---- who computes what


def test_only_what_is_absent_is_computed_and_order_is_kept(where, made):
    runs.collect({"a": of(5)}, where=where)
    records = runs.collect({"a": of(3, 5), "b": of(4, 3)}, where=where)
    assert made == [5, 3, 4]
    assert {name: [record.test["top1"] for record in group] for name, group in records.items()} == {
        "a": [3, 5],
        "b": [4, 3],
    }
    runs.collect({"a": of(3, 4, 5)}, where=where)
    assert made == [5, 3, 4]
    assert records["a"][0].arrays["test_pred"].tolist() == [0, 1, 2]


def test_load_never_computes(where, made):
    assert runs.load({"a": of(1, 2)}, where) == {"a": [None, None]}
    runs.collect({"a": of(2)}, where=where)
    loaded = runs.load({"a": of(1, 2)}, where)["a"]
    assert loaded[0] is None and loaded[1].test["top1"] == 2 and made == [2]
    # What a notebook's manifest lists.
    assert where.reads == {of(1)[0].id: False, of(2)[0].id: True}
    assert [runs.status_of(spec, where) for spec in of(1, 2)] == ["missing", "done"]


@pytest.mark.parametrize("pooled", [False, True])
def test_parents_first_and_shared_ones_once(where, made, pooled):
    parent = TINY.but(seed=1)
    middle = TINY.but(seed=2, init=parent)
    grid = {"children": of(3, 4, init=middle), "parents": [parent]}
    with ThreadPoolExecutor(4) as pool:
        records = runs.collect(grid, pool if pooled else None, where)
    assert made[:2] == [1, 2] and sorted(made) == [1, 2, 3, 4]
    assert [record.test["top1"] for record in records["children"]] == [3, 4]
    assert where.state(parent.id).is_file() and where.state(middle.id).is_file()
    # Nobody starts from it and nobody said keep.
    assert not where.state(grid["children"][0].id).exists()
    assert where.get(middle).status == "ok"  # it was never asked for, and its record is there


def test_parent_is_rebuilt_when_its_weights_are_gone_and_its_record_stands(where, made):
    parent = TINY.but(seed=1)
    first = runs.collect({"p": [parent], "c": of(2, init=parent)}, where=where)["p"][0]
    where.state(parent.id).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same weights again: nothing to say
        runs.collect({"c": of(3, init=parent)}, where=where)
    assert made == [1, 2, 1, 3]
    where.state(parent.id).unlink()
    made.version = 1
    with pytest.warns(UserWarning, match=f"run {parent.id} was rebuilt and its weights differ"):
        late = runs.collect({"c": of(4, init=parent)}, where=where)["c"][0]
    assert where.get(parent).content == first.content
    assert (
        late.weights["parent_differs"]
        and not where.get(TINY.but(seed=3, init=parent)).weights["parent_differs"]
    )


@pytest.mark.parametrize("left", ["nothing", "failed"])
@pytest.mark.parametrize("pooled", [False, True])
def test_weights_without_a_finished_record_are_those_of_a_killed_run(where, made, pooled, left):
    parent = TINY.but(seed=1)
    middle = TINY.but(seed=2, init=parent)
    grid = {"children": of(3, 4, init=middle)}
    runs.collect({"p": [middle.but(keep=True)]}, where=where)
    for spec in (parent, middle):  # as a kill leaves it between the weights and the record
        where.find(spec.id).unlink()
        if left == "failed":
            error = {"kind": "ValueError", "message": "bad"}
            head = {"id": spec.id, "spec": spec.model_dump(mode="json")}
            where.put(head | {"status": "failed", "error": error}, {}, spec)
    assert [spec.seed for spec in runs.missing_runs(grid, where)] == [1, 2, 3, 4]
    del made[:]
    with ThreadPoolExecutor(4) as pool:
        records = runs.collect(grid, pool if pooled else None, where)["children"]
    assert made[:2] == [1, 2] and sorted(made) == [1, 2, 3, 4]
    assert [where.get(spec).status for spec in (parent, middle)] == ["ok", "ok"]
    assert [record.weights["parent_differs"] for record in records] == [False, False]


def test_a_kept_run_whose_record_was_not_filed_is_computed_again(where, made):
    kept = TINY.but(seed=1, keep=True)
    runs.collect({"a": [kept]}, where=where)
    where.find(kept.id).unlink()
    assert not where.can_be_started_from(kept.id) and where.state(kept.id).is_file()
    runs.collect({"a": [kept]}, where=where)
    assert made == [1, 1] and where.can_be_started_from(kept.id)


def test_failing_rebuild_leaves_the_parents_record(where, made):
    parent = TINY.but(seed=1)
    runs.collect({"c": of(2, init=parent)}, where=where)
    where.state(parent.id).unlink()
    made.bad.add(1)
    with pytest.raises(RuntimeError, match="seed 1 is bad"):
        runs.collect({"c": of(3, init=parent)}, where=where)
    assert where.get(parent).status == "ok"


@pytest.mark.parametrize("pooled", [False, True])
def test_failed_run_is_raised_last_and_tried_again(where, made, pooled):
    made.bad.add(2)
    with ThreadPoolExecutor(1) as pool:
        executor = pool if pooled else None
        with pytest.raises(
            RuntimeError,
            match=rf"^run {of(2)[0].id}: ValueError: seed 2 is bad\nRuns that failed: 1\.",
        ):
            runs.collect({"a": of(1, 2, 3)}, executor, where)
        assert (
            sorted(made) == [1, 2, 3] and runs.load({"a": of(1, 3)}, where)["a"][1].status == "ok"
        )
        failed = where.get(of(2)[0])
        assert failed.status == "failed" and failed.error["message"] == "seed 2\n is bad"
        assert runs.status_of(of(2)[0], where) == "failed"
        made.bad.clear()
        records = runs.collect({"a": of(1, 2, 3)}, executor, where)["a"]
    assert made[3:] == [2] and [record.status for record in records] == ["ok"] * 3


def test_the_command_line_says_first_which_run_failed_and_why(made, monkeypatch, tmp_path, capsys):
    from lib import __main__ as command_line

    made.bad.add(2)
    monkeypatch.setenv("MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(command_line.parameters, "key_of", lambda name: name)
    monkeypatch.setattr(command_line.parameters, "from_text", lambda key, given: given)
    monkeypatch.setattr(command_line.profiles, "plan", lambda *_, **__: {"a": of(1, 2)})
    assert command_line.main(["run", "vimoe/routing", "--records"]) == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"error: run {of(2)[0].id}: ValueError: seed 2 is bad"


def test_wishes_of_equal_specs_are_joined(where, made):
    # One id, wanted kept by one and published by the other, and met as a parent that asks for
    # neither.
    plain = TINY.but(seed=1)
    runs.collect(
        {"a": [plain.but(publish=True), plain.but(keep=True)], "b": of(2, init=plain)}, where=where
    )
    assert made == [1, 2]
    assert where.find(plain.id).is_relative_to(where.published) and where.state(plain.id).is_file()


class Later:
    """A future that is not of the standard library, such as Dask's."""

    def __init__(self, value):
        self.result = lambda: value


def test_other_kinds_of_futures(where, made):
    class Executor:
        def submit(self, call, *args):
            return Later(call(*args))

    records = runs.collect({"a": of(1, 2)}, Executor(), where)["a"]
    assert [record.test["top1"] for record in records] == [1, 2]


def test_executor_that_lost_its_workers(where, made):
    class Executor:
        """The first job is lost with its worker; after that the pool takes no more."""

        lost = False

        def submit(self, call, *args):
            if self.lost:
                raise BrokenExecutor("no more")
            self.lost = True
            future = Future()
            future.set_exception(BrokenExecutor("a worker died"))
            return future

    with pytest.warns(UserWarning, match="was lost; the run goes on in the calling process"):
        records = runs.collect(
            {"a": of(1, 2), "b": of(4, init=TINY.but(seed=3))}, Executor(), where
        )
    assert (
        sorted(made) == [1, 2, 3, 4]
        and [r.status for group in records.values() for r in group] == ["ok"] * 3
    )


def test_checkpoint_goes_when_a_run_is_done(where, made):
    for pooled, seed in ((False, 1), (True, 2)):
        [spec] = of(seed)
        checkpoint = where.checkpoint(spec.id)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text("state")
        # A kill in the middle of a write.
        (checkpoint.parent / f".{checkpoint.name}.999.part").write_text("half a sta")
        other = where.checkpoint("0" * 16)
        other.write_text("of another run")
        made.bad.add(seed)
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(RuntimeError):
                runs.collect({"a": [spec]}, pool if pooled else None, where)
            assert checkpoint.is_file()  # a failed run may go on from it
            made.bad.clear()
            runs.collect({"a": [spec]}, pool if pooled else None, where)
        assert list(checkpoint.parent.iterdir()) == [other]


# ---- what lies in the store


def truncate(file):
    file.write_text(file.read_text()[:-30])


def edit(file):
    file.write_text(file.read_text().replace('"top1": 3.0', '"top1": 99.0'))


def no_checksum(file):
    content = json.loads(file.read_text())
    del content["checksum"]
    file.write_text(json.dumps(content))


def lose_arrays(file):
    file.with_suffix(".npz").unlink()


def edit_arrays(file):
    np.savez_compressed(file.with_suffix(".npz"), test_pred=np.arange(4))


def binary(file):
    file.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "harm, trouble",
    [
        (truncate, "line"),
        (edit, "checksum does not match"),
        (no_checksum, "no checksum"),
        (lose_arrays, "npz is absent"),
        (edit_arrays, "npz does not match"),
        (binary, "utf-8"),
    ],
)
def test_damaged_record_is_moved_aside_named_and_computed_again(where, made, harm, trouble):
    [spec] = of(3)
    record = runs.collect({"a": [spec]}, where=where)["a"][0]
    sound = record.result()
    harm(record.file)
    hurt = record.file.read_bytes()
    with pytest.warns(
        UserWarning, match=f"{spec.id}.json of foundations is damaged .*{trouble}.*computed again"
    ):
        again = runs.collect({"a": [spec]}, where=where)["a"][0]
    assert made == [3, 3] and again.result() == sound
    [aside] = (where.private / "damaged").glob(f"*/{spec.id}.json")
    assert aside.read_bytes() == hurt  # moved, not deleted


def test_record_under_another_name_is_not_taken_for_it(where, made):
    one, two = of(1, 2)
    file = runs.collect({"a": [one]}, where=where)["a"][0].file
    file.with_name(f"{two.id}.json").write_text(file.read_text())
    with pytest.warns(UserWarning, match=f"it holds run {one.id}"):
        assert where.get(two) is None
    assert where.get(one) is not None


def test_white_space_is_no_damage(where, made):
    file = runs.collect({"a": of(1)}, where=where)["a"][0].file
    file.write_text(json.dumps(json.loads(file.read_text())))
    assert where.get(of(1)[0]).test["top1"] == 1


def test_published_records_lie_in_results_and_failed_ones_never(where, made):
    made.bad.add(2)
    with pytest.raises(RuntimeError):
        runs.collect({"a": of(1, 2, publish=True, study="vimoe"), "b": of(3)}, where=where)
    assert [file.name for file in sorted(where.published.glob("vimoe/*.json"))] == [
        f"{of(1)[0].id}.json"
    ]
    assert (where.published / "vimoe" / f"{of(1)[0].id}.npz").is_file()
    made.bad.clear()
    runs.collect({"a": of(2, publish=True, study="vimoe")}, where=where)
    assert where.find(of(2)[0].id) == where.published / "vimoe" / f"{of(2)[0].id}.json"
    # the failed one is gone
    assert not (where.private / "records" / "vimoe" / f"{of(2)[0].id}.json").exists()
    # The study is a folder, not a part of the name: another study reads the same record.
    runs.collect({"c": of(1, study="durham")}, where=where)
    assert sorted(made) == [1, 2, 2, 3]


def test_record_reads_like_its_entries(where, made):
    import copy
    import pickle

    record = runs.collect({"a": of(1)}, where=where)["a"][0]
    with pytest.raises(
        AttributeError, match=f"record {record.id} has no 'tset'; it has id, spec, status"
    ):
        record.tset  # noqa: B018
    assert copy.copy(record).test == pickle.loads(pickle.dumps(record)).test == {"top1": 1.0}


# ---- the real thing, once


def test_real_runs_in_process_and_in_a_pool_are_equal(where, tmp_path):
    # The only test here that trains, and in a worker that starts from nothing: seconds of importing
    # torch.
    parent = TINY.but(train=TrainSpec(epochs=1.0, batch=16))
    moe = MoESpec(layers=1, experts=2)
    grid = {
        "a": [
            TINY.but(init=parent, moe=moe, train=TrainSpec(epochs=0.5, batch=16), seed=seed)
            for seed in (0, 1)
        ]
    }
    here = runs.collect(grid, where=where)["a"]
    other = Store(tmp_path / "published2", tmp_path / "private2")
    published = {"a": [spec.but(publish=True) for spec in grid["a"]]}
    with runs.pool(1) as pool:
        there = runs.collect(published, pool, other)["a"]
    assert [r.result() for r in there] == [r.result() for r in here]
    assert all(r.file.is_relative_to(other.published) for r in there)
    assert here[0].result() != here[1].result()
    record = there[0]
    assert (
        record.weights["parent"]
        == where.get(parent).weights["final"]
        == other.get(parent).weights["final"]
    )
    assert record.arrays["test_pred"].shape == (30,) and record.arrays["token_expert"].shape == (
        1,
        12,
        17,
    )
    assert (
        record.test["n"] == 30
        and record.val["n"] == 20
        and len(record.moe) == 1
        and record.environment["threads"] == 1
    )


def test_a_private_record_is_published_once_it_is_asked_for(where, made):
    spec = TINY.but(seed=3)
    runs.collect({"a": [spec]}, where=where)
    assert where.find(spec.id).is_relative_to(where.private)
    [record] = runs.collect({"a": [spec.but(publish=True)]}, where=where)["a"]
    assert record.file.is_relative_to(where.published) and record.arrays["test_pred"].tolist() == [
        0,
        1,
        2,
    ]
    assert made == [3]  # copied, not computed again


def test_only_the_grid_counts_as_read(where, made):
    """A manifest lists what a page read; a parent that was absent when a run began is no reason to
    run the page again."""
    parent = TINY.but(seed=1)
    child = TINY.but(seed=2, init=parent)
    runs.collect({"a": [child]}, where=where)
    assert made == [1, 2] and where.reads == {child.id: True}
