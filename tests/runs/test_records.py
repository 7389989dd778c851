"""The entries and arrays that a record holds, by kind of run."""

from __future__ import annotations

import numpy as np
import pytest

from lib.measure.probes import PROBES, Probe, ProbeResult
from lib.models.moe import RoutingTape
from lib.runs import collect as runs
from lib.spec import (
    BackboneSpec,
    DataSpec,
    DropSpec,
    ExtractSpec,
    MaskSpec,
    MoESpec,
    PruneSpec,
    RunSpec,
    TrainSpec,
)

DENSE = RunSpec(
    data=DataSpec(train=80, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2, hidden=24),
    train=TrainSpec(epochs=0.5, batch=40, lr=3e-3),
    threads=1,
)
MOE = DENSE.but(moe=MoESpec(layers=1, experts=2, router="token"))
MASK = {"mask": MaskSpec(ratio=0.75, width=16, depth=1, heads=2)}
PRUNE = PruneSpec(share=0.5, images=20)
EXTRACT = ExtractSpec(
    neurons={"active": 0.5},
    clusters={"method": "kmeans", "count": 2, "sample": 200},
    calibration={"images": 40},
)

ALWAYS = {"id", "spec", "semantics", "environment", "code", "created", "status", "classes"}
ALWAYS |= {"history", "curve", "val", "test", "moe", "cost", "weights", "timing"}
ALWAYS |= {"arrays", "checksum"}
PREDICTIONS = {"test_label", "test_pred"}
ROUTING = {"class_expert", "position_expert", "token_expert", "probe_index"}
PICTURES = {"test_label", "picture", "hidden", "probe_index"}


@pytest.mark.parametrize(
    "spec, entries, arrays",
    [
        (DENSE, {"memory"}, PREDICTIONS),
        (DENSE.but(train=None), set(), PREDICTIONS),
        (DENSE.but(depth_probe=True), {"memory", "depth"}, PREDICTIONS),
        (DENSE.but(cam_probe=True), {"memory"}, PREDICTIONS | {"cam", "probe_index"}),
        (
            DENSE.but(cam_probe=True, cam_first=True),
            {"memory"},
            PREDICTIONS | {"cam", "cam_first", "probe_index"},
        ),
        (DENSE.but(colour_probe=True), {"memory"}, PREDICTIONS),
        (MOE, {"memory"}, PREDICTIONS | ROUTING),
        (MOE.but(experts_off=True), {"memory", "experts_off"}, PREDICTIONS | ROUTING),
        (MOE.but(colour_probe=True), {"memory"}, PREDICTIONS | ROUTING | {"checker_expert"}),
        (MOE.but(image_loads=True), {"memory"}, PREDICTIONS | ROUTING | {"image_loads"}),
        (MOE.but(probe_pairs=True), {"memory"}, PREDICTIONS | ROUTING | {"probe_place"}),
        (DENSE.but(init=DENSE, prune=PRUNE), {"memory", "prune"}, PREDICTIONS),
        (
            MOE.but(init=MOE, drop=DropSpec(score="load", images=20), train=None),
            {"drop"},
            PREDICTIONS | ROUTING,
        ),
        (DENSE.but(init=DENSE, extract=EXTRACT, train=None), {"extract"}, PREDICTIONS | ROUTING),
        (DENSE.but(init=DENSE, extract=EXTRACT), {"memory", "extract"}, PREDICTIONS | ROUTING),
        (DENSE.but(train=MASK), {"memory"}, PICTURES),
        (MOE.but(train=MASK, colour_probe=True), {"memory"}, PICTURES | ROUTING),
    ],
)
def test_entries_and_arrays(where, spec, entries, arrays):
    record = runs.collect({"one": [spec]}, where=where)["one"][0]
    assert set(record.content) == ALWAYS | entries and set(record.arrays) == arrays
    validated = spec.train is not None or "extract" in entries
    losses = (
        {"loss"} if spec.train is not None and spec.train.mask is not None else {"top1", "loss"}
    )
    assert set(record.test) == {"n"} | losses
    assert set(record.val) == ({"n"} | losses if validated else set())
    trained = {"train_seconds", "train_images_per_s"} if spec.train is not None else set()
    always = {"eval_images_per_s", "peak_rss_mib", "run_seconds"}
    assert set(record.timing) == always | trained
    assert set(record.weights) >= {"start", "parent", "final"}
    assert len(record.moe) == (spec.moe is not None) + 2 * ("extract" in entries)
    assert set(record.cost) == {"params_stored", "params_active", "macs"}


def test_a_new_probe_is_a_line_in_the_table(where, monkeypatch):
    def layers(inputs):
        names = list(RoutingTape(inputs.model).layers.values())
        return ProbeResult({"layers": names}, {"layer_count": np.array(len(names))})

    probe = Probe(wanted=lambda spec, model: spec.moe is not None, measure=layers)
    monkeypatch.setitem(PROBES, "layers", probe)
    without, with_it = runs.collect({"one": [DENSE, MOE]}, where=where)["one"]
    assert with_it.layers == ["blocks.1.mlp"] and with_it.arrays["layer_count"] == 1
    assert "layers" not in without.content and "layer_count" not in without.arrays
