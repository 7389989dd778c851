"""Runs that start from runs: pretraining, finetuning under another strategy, gates alone; and what
they cost."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from lib.measure.cost import count
from lib.models.backbone import create, skeleton
from lib.models.upcycle import upcycle
from lib.routers.manual import ManualRouter
from lib.runs import collect as runs
from lib.spec import BackboneSpec, DataSpec, MaskSpec, MoESpec, RunSpec, TrainSpec

DENSE = MoESpec(
    layers=2,
    experts=2,
    top_k=2,
    router="token",
    balance="none",
    fresh_experts=True,
    sharpness_weight=1e-3,
    variation_weight=1e-3,
)
BASE = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2, hidden=24),
    moe=DENSE,
    train=TrainSpec(epochs=2.0, batch=32, lr=3e-3),
    threads=1,
)
MAE = BASE.but(train={"mask": MaskSpec(ratio=0.75, width=16, depth=1, heads=2)})


def run(where, spec):
    return runs.collect({"one": [spec.but(keep=True)]}, where=where)["one"][0]


def test_pretraining_leaves_losses_and_pictures(where):
    record = run(where, MAE)
    assert "top1" not in record.test and "val_top1" not in record.history[-1]
    assert record.history[-1]["val_loss"] < record.history[0]["val_loss"]
    assert (
        record.arrays["picture"].shape == (12, 1, 28, 28)
        and record.arrays["hidden"].sum(axis=1).tolist() == [12] * 12
    )
    assert record.arrays["position_expert"].shape == (2, 5, 2)  # class token and 4 of 16 patches
    # One further expert and a router a layer.
    assert record.cost["params_stored"] == count(
        create(BASE.backbone, 28, 10, 1), 28
    ).params_stored + 2 * (24 * 16 + 24 + 24 * 16 + 16 + 2 * 16)


@pytest.mark.parametrize(
    "router",
    [
        {"router": "expert_choice", "top_k": 1},
        {"router": "priority", "top_k": 1},
        {"router": "token", "top_k": 1, "capacity_factor": 1.0, "batch_priority": True},
        {"router": "soft", "top_k": 1},
    ],
)
def test_other_strategies_start_from_the_same_pretrained_weights(where, router):
    child = BASE.but(init=MAE, moe=DENSE.but(**router, sharpness_weight=0.0, variation_weight=0.0))
    record = run(where, child)
    assert record.status == "ok" and record.weights["parent"] is not None and record.test["n"] == 30
    assert all(sum(layer["load"]) == pytest.approx(1) for layer in record.moe)
    if router["router"] in ("expert_choice", "priority"):
        assert max(max(layer["load"]) for layer in record.moe) < 0.55  # balanced by construction


def test_gate_stage_changes_no_other_weight(where):
    dense = BASE.but(init=MAE)
    sparse = dense.but(
        init=dense,
        moe=DENSE.but(top_k=1, sharpness_weight=0.0, variation_weight=0.0),
        fresh_routers=True,
        train={"trainable": "routers", "distil": "choice"},
    )
    record = run(where, sparse)
    before, after = (load_file(where.state(spec.id)) for spec in (dense, sparse))
    assert before.keys() == after.keys()
    for name in before:
        if ".router.weight" in name:
            assert not torch.equal(before[name], after[name])
        else:
            assert torch.equal(before[name], after[name]), name
    # At most about ln 2, the loss of a gate that knows nothing.
    assert record.history[-1]["train_distil_loss"] < 0.72


def test_distilled_gate_agrees_with_the_dense_one_more_than_a_fresh_one(where):
    dense = BASE.but(init=MAE)
    moe = DENSE.but(top_k=1, sharpness_weight=0.0, variation_weight=0.0)
    gate = dense.but(
        init=dense,
        moe=moe,
        fresh_routers=True,
        train={
            "trainable": "routers",
            "distil": "probabilities",
            "epochs": 8.0,
            "lr": 0.1,
            "weight_decay": 0.0,
        },
    )
    record = run(where, gate)
    losses = [row["train_distil_loss"] for row in record.history[1:]]
    assert losses[-1] < 0.5 * losses[0]


def test_experts_off_and_dropout(where):
    off = run(where, BASE.but(experts_off=True))
    assert 0 <= off.experts_off["top1"] <= 100 and off.experts_off["n"] == 30
    dropped = run(where, BASE.but(moe={"expert_dropout": 0.5}))
    assert (
        dropped.weights["start"] == off.weights["start"]
        and dropped.weights["final"] != off.weights["final"]
    )


def test_manual_routing_sends_classes_to_their_expert(where):
    groups = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
    record = run(
        where,
        BASE.but(moe=MoESpec(layers=1, experts=2, router="manual", groups=groups, balance="none")),
    )
    table = record.arrays["class_expert"][0]
    assert (table[:5, 1] == 0).all() and (table[5:, 0] == 0).all() and table.sum() == 30
    with pytest.raises(ValueError, match="no expert for class 9"):
        upcycle(
            create(BASE.backbone, 28, 10, 1),
            MoESpec(
                layers=1,
                experts=1,
                router="manual",
                groups=((0, 1, 2, 3, 4, 5, 6, 7, 8, 10),),
                balance="none",
            ),
        )
    assert any(
        isinstance(m, ManualRouter)
        for m in upcycle(
            create(BASE.backbone, 28, 10, 1),
            MoESpec(layers=1, experts=2, router="manual", groups=groups, balance="none"),
        ).modules()
    )


@pytest.mark.parametrize(
    ("distil", "router"),
    [
        ({"distil": "probabilities"}, "image"),
        ({"distil_logits": 0.5}, "token"),
        ({"distil_stream": 0.5}, "token"),
    ],
)
def test_a_model_that_is_routed_by_hand_can_teach(where, distil, router):
    """The teacher is told the classes, too."""
    groups = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
    by_hand = {"router": "manual", "groups": groups, "balance": "none"}
    parent = BASE.but(moe=MoESpec(layers=1, experts=2, **by_hand), keep=True)
    learnt = MoESpec(layers=1, experts=2, router=router)
    child = parent.but(init=parent, moe=learnt, train={"epochs": 1.0, **distil}, keep=False)
    assert run(where, child).status == "ok"
    with pytest.raises(ValidationError, match="'manual' decides for images, router='token' for"):
        child.but(moe={"router": "token"}, train={"distil": "choice"})


def test_a_loss_that_blows_up_is_a_failed_record(where):
    spec = BASE.but(moe={"sharpness_weight": 1e38, "variation_weight": 1e38, "guard": 1e-30})
    with pytest.raises(RuntimeError, match="not finite at step 0"):
        run(where, spec)
    record = where.peek(spec.id)
    assert record.status == "failed" and record.error["step"] == 0


@pytest.mark.parametrize(
    "router, passed, stored",
    [
        # 2 images of 5 tokens, 2 experts, H=24, D=16: an expert row costs 2*24*16 = 768.
        ({"router": "expert_choice", "choices": 1.0}, 2 * 2 * 3, 32),
        ({"router": "priority"}, 10, 32),
        ({"router": "manual", "groups": ((0,), (1,))}, 10, 0),
        ({"router": "soft"}, 2 * 2, 33),
    ],
)
def test_cost_of_the_strategies(router, passed, stored):
    spec = BackboneSpec(patch=14, width=16, depth=1, heads=2, hidden=24)
    model = upcycle(create(spec, 28, 2, 1), MoESpec(layers=1, experts=2, balance="none", **router))
    touched = 2.0 if router["router"] == "priority" else None  # the others say it themselves
    table = count(model, 28, images=2, experts_per_image=touched).table().set_index("module")
    experts = table[table.index.str.contains("experts.fc")]
    assert experts.macs.sum() == passed * 768
    routers = table[table.kind == "router"]
    assert routers.stored.sum() == stored
    if router["router"] == "soft":
        assert routers.macs.sum() == 3 * 10 * 2 * 16


def test_the_reports_model_has_its_printed_size():
    """Durham report: 36 px, patch 3, width 192, depth 6, four experts of hidden width 448 in every
    block: 5.1M parameters."""
    spec = BackboneSpec(patch=3, width=192, depth=6, heads=12, hidden=448)
    with torch.device("meta"):
        model = upcycle(
            create(spec, 36, 100, 3), MoESpec(layers=6, experts=4, top_k=4, router="token")
        )
    assert model.blocks[0].mlp.experts.hidden == 448
    counted = count(model, 36)
    assert round(counted.params_stored / 1e6, 1) == 5.1 and counted.params_stored == 5_095_780


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: BASE.but(moe=None, init=BASE), "same layers, experts, shared and members"),
        (
            lambda: BASE.but(init=BASE, moe={"experts": 4}),
            "same layers, experts, shared and members",
        ),
        (lambda: MAE.but(init=BASE), "not from init"),
        (lambda: MAE.but(train={"layer_decay": 0.5}), "counts layers from a head"),
        (lambda: BASE.but(train={"distil": "choice"}), "needs a parent with gates"),
        (lambda: MoESpec(router="priority", top_k=2), "top_k=2 is for .* leave it at 1"),
        (lambda: MoESpec(router="manual"), "groups"),
        (lambda: MoESpec(router="manual", experts=2, groups=((0,),)), "names 1 experts"),
        (lambda: MoESpec(router="token", batch_priority=True), "needs a capacity_factor"),
        (lambda: MoESpec(router="expert_choice", experts=2, choices=3.0), "more than experts=2"),
        (lambda: MoESpec(router="soft", shared=True), "shared=True is for .* leave it at False"),
        (lambda: BackboneSpec(hidden=448), "set width"),
        (lambda: MoESpec(router="expert_choice", balance="loss_free"), "moves a top-k choice"),
    ],
)
def test_bad_stages_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_skeleton_counts_the_same_as_the_built_model():
    assert count(skeleton("vit_small_patch14_dinov2"), 224).params_stored == 22_013_800
