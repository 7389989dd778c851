"""The model of a run before its training is the one that its record says it started from."""

import pytest

from lib.inputs.weights import sha256_state
from lib.runs.collect import collect
from lib.runs.execute import prepared
from lib.runs.store import Store
from lib.spec import BackboneSpec, DataSpec, MoESpec, PruneSpec, RunSpec, TrainSpec

DENSE = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    train=TrainSpec(epochs=1.0, batch=32),
    threads=1,
    keep=True,
)


@pytest.mark.parametrize(
    "change",
    [
        {"moe": MoESpec(layers=1, experts=2)},
        {"moe": MoESpec(layers=2, experts=2, top_k=2, router="token"), "prune": PruneSpec()},
    ],
)
def test_it_starts_from_what_the_record_says(tmp_path, change):
    where = Store(tmp_path / "results", tmp_path / "cache")
    child = DENSE.but(init=DENSE, keep=False, **change)
    with pytest.raises(FileNotFoundError, match=DENSE.id):
        prepared(child, str(where.states))
    (record,) = collect({"run": [child]}, where=where)["run"]
    assert sha256_state(prepared(child, str(where.states)).state_dict()) == record.weights["start"]
    assert record.weights["start"] != record.weights["final"]
