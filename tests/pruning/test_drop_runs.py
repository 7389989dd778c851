"""Runs that lose whole experts, compete, or are ensembles: what is recorded, what a child starts
from, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from lib.inputs.splits import load_splits
from lib.measure.cost import count
from lib.models.backbone import build
from lib.models.ensemble import Ensemble
from lib.models.pruned import PrunedLayer
from lib.models.step import StepInputs
from lib.pruning.steps import DropStep
from lib.runs import collect as runs
from lib.runs.restore import restored
from lib.spec import BackboneSpec, DataSpec, DropSpec, MoESpec, PruneSpec, RunSpec, TrainSpec
from lib.training import checkpoint, loop

D, H, E, DEPTH = 16, 24, 4, 2
MOE = MoESpec(layers=DEPTH, experts=E, router="token", router_std=0.5)
FIRST = RunSpec(
    data=DataSpec(train=80, val=20, test=30, classes=(0, 5)),
    moe=MOE,
    threads=1,
    train=TrainSpec(batch=40, epochs=1.0, lr=3e-3),
    backbone=BackboneSpec(patch=7, width=D, depth=DEPTH, heads=2, hidden=H),
)
TUNED = FIRST.but(init=FIRST, data={"classes": (5, 10)})


def run(where, spec):
    return runs.collect({"one": [spec.but(keep=True)]}, where=where)["one"][0]


def dropped(base=TUNED, then=None, **fields):
    return base.but(init=base, drop=DropSpec(images=20, **fields), train=then)


def test_the_other_classes_get_a_fresh_head_and_the_rest_goes_on(where):
    record = run(where, TUNED)
    assert record.classes == ["5", "6", "7", "8", "9"] and record.test["n"] == 30
    first = load_file(where.state(FIRST.id))
    model = build(TUNED, 5, 1, first)
    assert not torch.equal(model.head.weight, first["head.weight"]) and torch.equal(
        model.norm.weight, first["norm.weight"]
    )
    same = build(TUNED.but(data=FIRST.data), 5, 1, first)
    assert torch.equal(same.head.weight, first["head.weight"])


def test_an_expert_is_dropped_by_the_growth_of_its_router_norm(where):
    spec = dropped(share=0.5)
    record = run(where, spec)
    before, after = (load_file(where.state(each.id)) for each in (FIRST, TUNED))
    left = load_file(where.state(spec.id))
    for block in range(DEPTH):
        name = f"blocks.{block}.mlp"
        grown = [
            after[f"{name}.router.weight"][e].norm() - before[f"{name}.router.weight"][e].norm()
            for e in range(E)
        ]
        best = sorted(sorted(range(E), key=lambda e: -grown[e])[:2])
        assert left[f"{name}.kept"].tolist() == best
        assert torch.equal(
            left[f"{name}.experts.fc1.weight"], after[f"{name}.experts.fc1.weight"][best]
        )
    whole = where.get(TUNED)
    assert whole.cost["params_stored"] - record.cost["params_stored"] == DEPTH * 2 * (
        2 * D * H + D + H
    )
    lost, tokens = [row["dropped"] for row in record.moe], 1 + (28 // 7) ** 2
    assert max(lost) > 0 and [row["dropped"] for row in whole.moe] == [0, 0]
    # rounded
    assert whole.cost["macs"] - record.cost["macs"] == pytest.approx(
        sum(lost) * tokens * 2 * D * H, abs=DEPTH * 2
    )
    assert all(
        row["load"][e] == 0
        for row in record.moe
        for e in range(E)
        if e not in left[f"blocks.{row['block']}.mlp.kept"]
    )


@pytest.mark.parametrize("missing", ["zero_update", "reroute"])
def test_a_child_and_a_restored_model_go_on_without_the_dropped(where, missing):
    spec = dropped(share=0.25, score="load", missing=missing)
    child = spec.but(init=spec, drop=None, train=TUNED.train)
    record, state = run(where, child), load_file(where.state(spec.id))
    assert record.cost["params_stored"] == where.get(spec).cost["params_stored"]
    splits = load_splits(spec.data)
    images, model = (
        splits.test.batch(torch.arange(4), spec.data),
        restored(spec, state, 5, 1).eval(),
    )
    tuned = restored(TUNED, load_file(where.state(TUNED.id)), 5, 1).eval()
    inputs = StepInputs(spec, splits.train, 5, state_of=dict)
    report = DropStep(spec.drop).apply(tuned, inputs).report
    with pytest.raises(
        ValueError,
        match="blocks.0.mlp has 3 experts in the state; of 4 the shares of run .* leave 2",
    ):
        restored(spec.but(drop={"share": 0.5}), state, 5, 1)
    assert torch.equal(model(images), tuned(images)) and where.get(spec).drop == report
    assert torch.equal(runs.model_of(spec, where)(images), model(images))
    assert isinstance(model.blocks[0].mlp, PrunedLayer) == (missing == "zero_update")


@pytest.mark.parametrize("score", ["dern", "merge"])
def test_merging_rivals_end_with_as_many_experts(where, score):
    record = run(where, dropped(share=0.5, score=score, missing="reroute", then=TUNED.train))
    assert (
        load_file(where.state(record.id))["blocks.1.mlp.experts.fc1.weight"].shape == (2, H, D)
        and len(record.history) == 2
    )


def test_the_grandparent_is_rebuilt_where_its_weights_are_gone(where):
    run(where, TUNED)
    where.state(FIRST.id).unlink()
    record = run(where, dropped(share=0.5))
    assert record.status == "ok" and where.state(FIRST.id).is_file()


def test_an_ensemble_trains_its_members_and_loses_the_same_share_of_each(where):
    first = FIRST.but(moe={"members": 2})
    tuned = TUNED.but(moe={"members": 2}, init=first)
    record = run(where, dropped(tuned, share=0.5, missing="reroute"))
    model = build(first, 5, 1)
    assert isinstance(model, Ensemble)
    cost = count(model.vit, 28)
    assert where.get(first).cost["params_stored"] == cost.params_stored
    left = load_file(where.state(record.id))
    assert [left[f"vit.blocks.{b}.mlp.router.group"].tolist() for b in range(DEPTH)] == [
        [0, 1]
    ] * DEPTH
    assert record.arrays["token_expert"].shape == (DEPTH, 12, 17) and record.test["n"] == 30
    # Both members decide for each token.
    assert np.sum(record.arrays["class_expert"]) == DEPTH * 2 * 30 * 17


def test_competition_trains_the_router_towards_the_largest_responses(where):
    start = build(FIRST, 5, 1).blocks[0].mlp.router.weight.detach()
    turned = {}
    for weight in (1.0, 0.0):
        record = run(
            where, FIRST.but(moe={"compete_rate": 1.0, "balance": "none", "compete_weight": weight})
        )
        router = load_file(where.state(record.id))["blocks.0.mlp.router.weight"]
        turned[weight] = 1 - torch.nn.functional.cosine_similarity(router, start, dim=1).min()
    # Where responses alone decide and nothing pulls it, the router has no gradient: weight decay
    # changes its length alone.
    assert turned[0.0] < 1e-6 < turned[1.0]


def test_experts_dropped_in_training_until_one_is_left(where, tmp_path, monkeypatch):
    spec = TUNED.but(train={"single_expert_at": 0.5, "epochs": 2.0})
    record = run(where, spec)
    state = load_file(where.state(spec.id))
    assert (
        state["blocks.0.mlp.experts.fc1.weight"].shape == (1, H, D)
        and "blocks.0.mlp.router.alive" not in state
    )
    assert all(row["load"] == [1.0] for row in record.moe)
    # The checkpoint carries what decides the drops: broken off and resumed, the weights are the
    # same.
    splits, parent = load_splits(spec.data), load_file(where.state(FIRST.id))
    file = tmp_path / "run.pt"

    class Stop(Exception):
        pass

    def stop(_):
        raise Stop

    broken = build(spec, 5, 1, parent)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Stop):
        loop.fit(broken, splits.train, None, spec, checkpoint.Checkpoint(file), report=stop)
    again, _ = loop.fit(
        build(spec, 5, 1, parent), splits.train, None, spec, checkpoint.Checkpoint(file)
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("side", [28, 56])
def test_gradcam_is_taken_in_the_first_and_in_the_last_block(where, side):
    """4x4 patches of 7 pixels, and 8x8."""
    spec = FIRST.but(data={"image_size": side}, cam_probe=True, cam_first=True)
    record = run(where, spec)
    last, first = record.arrays["cam"], record.arrays["cam_first"]
    assert last.shape == first.shape == (12, side, side)
    assert first.max() == 1 and not np.allclose(first, last, atol=0.1)
    assert record.arrays["token_expert"].shape[-1] == 1 + (side // 7) ** 2
    with pytest.raises(ValidationError, match="set cam_probe=True, too"):
        spec.but(cam_probe=False)


def test_gradcam_of_the_probe_images(where):
    record = run(where, TUNED.but(cam_probe=True))
    cam = record.arrays["cam"]
    assert (
        cam.shape == (12, 28, 28)
        and cam.min() >= 0
        and cam.max() <= 1
        and (cam.std(axis=(1, 2)) > 0.01).sum() > 6
    )
    with pytest.raises(ValueError, match="cam_probe=True needs the patch grid"):
        run(where, FIRST.but(moe={"members": 2}, cam_probe=True))


def test_the_resident_set_falls_where_neurons_go(where):
    wide = TUNED.but(moe=None, init=None, resident=True, backbone={"width": 64, "hidden": 8192})
    cut = wide.but(prune=PruneSpec(share=0.95, images=20, kind="magnitude"))
    before, after = (run(where, spec).memory for spec in (wide, cut))
    # MiB of the weights that went; as much for gradients and for each moment.
    held = 2 * 2 * 64 * 8192 * 0.95 * 4 / 2**20
    assert before["resident"] - after["resident"] > 3 * held
    assert before["resident"] > before["weights"] + before["gradients"] + before["optimiser"]


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: FIRST.but(drop=DropSpec()), "drop takes experts out of a parent's mixture"),
        (
            lambda: FIRST.but(init=FIRST.but(moe=None), drop=DropSpec(score="load")),
            "out of a parent's mixture",
        ),
        (
            lambda: FIRST.but(init=FIRST, drop=DropSpec()),
            "compares with the model before finetuning",
        ),
        (lambda: DropSpec(score="dern"), "set missing='reroute'"),
        (lambda: DropSpec(share=1.0), "share"),
        (lambda: MOE.but(members=3), "members=3 must divide experts=4"),
        (lambda: MOE.but(members=4, top_k=2), "top_k=2 is more than the 1 experts"),
        (lambda: MOE.but(compete_rate=0.5, noise=1.0), "without noise"),
        (
            lambda: TUNED.but(init=FIRST.but(moe={"members": 2})),
            "the same layers, experts, shared and members",
        ),
        (
            lambda: FIRST.but(moe={"top_k": 2}, train={"single_expert_at": 0.5}),
            "single_expert_at drops all experts but one",
        ),
    ],
)
def test_bad_specs(make, says):
    with pytest.raises(ValidationError, match=says):
        make()


def test_a_share_that_is_no_whole_number_of_experts_is_refused_before_any_work(where):
    with pytest.raises(ValueError, match="give a multiple of 1/4"):
        run(where, dropped(share=0.3))
    with pytest.raises(ValueError, match="leaves none"):
        run(where, dropped(share=0.9))
    two = FIRST.but(moe={"top_k": 2})
    with pytest.raises(ValueError, match="leaves 1 experts to choose among, moe.top_k=2"):
        run(where, dropped(TUNED.but(moe={"top_k": 2}, init=two), share=0.75, missing="reroute"))
    assert not list(where.private.rglob("*.json"))
