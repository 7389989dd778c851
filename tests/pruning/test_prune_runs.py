"""Runs that are pruned before they train: what is removed, what is recorded, and what a child of
them starts from."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from lib.inputs.splits import load_splits
from lib.models.backbone import build
from lib.models.step import StepInputs
from lib.pruning import steps
from lib.pruning.neurons.calibration import calibration
from lib.pruning.neurons.removal import remove
from lib.pruning.neurons.scores import expert_scores, keep_indices, neuron_scores
from lib.pruning.steps import PruneStep
from lib.runs import collect as runs
from lib.runs.restore import restored
from lib.runs.store import Store
from lib.spec import (
    BackboneSpec,
    DataSpec,
    MaskSpec,
    MoESpec,
    PruneSpec,
    RunSpec,
    TrainSpec,
    class_groups,
)
from lib.training import loop

D, H, HEADS, DEPTH, E = 16, 24, 2, 2, 4
BASE = RunSpec(
    data=DataSpec(train=80, val=20, test=30),
    threads=1,
    train=TrainSpec(epochs=1.0, batch=40, lr=3e-3),
    backbone=BackboneSpec(patch=7, width=D, depth=DEPTH, heads=HEADS, hidden=H),
)
HEAD = BASE.but(train={"trainable": "head"})
PRUNE = PruneSpec(share=0.5, images=20, batches=2)
MOE = MoESpec(layers=DEPTH, experts=E, top_k=2, router="token")


@pytest.mark.parametrize("batches", [1, 3, 12, 20])
def test_images_are_divided_into_as_many_batches_as_asked(batches, monkeypatch):
    monkeypatch.setattr(steps, "_batch", lambda inputs, part: part)
    parts = PruneStep(PRUNE.but(batches=batches))._batches(None, torch.arange(20))
    assert len(parts) == batches and torch.equal(torch.cat(parts), torch.arange(20))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def run(where, spec):
    return runs.collect({"one": [spec.but(keep=True)]}, where=where)["one"][0]


def kept_neurons(scores):
    return {name: keep_indices(score, PRUNE.share) for name, score in scores.items()}


def in_groups(mlps: int, hidden: int, dims: int) -> int:
    """Weights and biases in the groups: fc1 row, bias entry and fc2 column a neuron; rows of Q, K,
    V and a column of proj."""
    return DEPTH * (mlps * hidden * (2 * D + 1) + HEADS * dims * (3 * (D + 1) + D))


def test_dense_run_is_pruned_and_its_child_starts_from_what_is_left(where):
    pruned = BASE.but(init=HEAD, prune=PRUNE)
    child = BASE.but(init=pruned, train={"epochs": 0.5})
    record = run(where, child)
    parent = where.get(pruned)
    assert parent.prune == {
        "before": in_groups(1, H, D // HEADS),
        "after": in_groups(1, H // 2, D // HEADS // 2),
    }
    whole = where.get(HEAD)
    assert (
        whole.cost["params_stored"] - parent.cost["params_stored"]
        == parent.prune["before"] - parent.prune["after"]
    )
    uncut = run(where, BASE.but(init=HEAD))
    assert all(
        parent.memory[kind] < uncut.memory[kind]
        for kind in ("weights", "gradients", "optimiser", "activations")
    )
    assert whole.memory["gradients"] == (D + 1) * 10 * 4 / 2**20  # of the head alone
    assert record.cost == parent.cost and record.weights["parent"] == parent.weights["final"]
    assert load_file(where.state(child.id))["blocks.0.mlp.fc1.weight"].shape == (H // 2, D)


def test_experts_are_pruned_by_class_group_and_then_attention(where):
    spec = BASE.but(init=HEAD, moe=MOE, prune=PRUNE)
    record = run(where, spec)
    assert record.prune == {
        "before": in_groups(E, H, D // HEADS),
        "after": in_groups(E, H // 2, D // HEADS // 2),
    }
    state = load_file(where.state(spec.id))
    assert restored(spec, state, 10, 1).blocks[0].mlp.experts.widths == (H // 2,) * E
    with pytest.raises(ValueError, match="blocks.0.mlp.experts.0 has 12 groups"):
        restored(spec.but(prune={"share": 0.25}), state, 10, 1)
    splits = load_splits(spec.data)
    left = {}
    for by_class in (True, False):
        each = spec.but(prune={"by_class": by_class})
        model = build(each, 10, 1, load_file(where.state(HEAD.id)))
        torch.manual_seed(1)  # must not matter
        PruneStep(each.prune).apply(model, StepInputs(each, splits.train, 10, state_of=dict))
        left[by_class] = model
    first_cut = left[True]
    first = [w1 for w1, *_ in first_cut.blocks[0].mlp.experts.each()]
    assert not torch.equal(first[0], first[1]), (
        "copies scored on different classes keep different neurons"
    )
    generator = torch.Generator().manual_seed(spec.seed)
    whole, images = build(spec, 10, 1, load_file(where.state(HEAD.id))), []
    balanced = calibration(splits.train.labels, [range(10)], 20, generator)
    for index in balanced + calibration(splits.train.labels, class_groups(10, E), 20, generator):
        images.append(
            [
                (splits.train.batch(part, spec.data), splits.train.labels[part])
                for part in index.chunk(2)
            ]
        )
    cut = remove(copy.deepcopy(whole), kept_neurons(expert_scores(whole, images[1:])))
    # Attention is scored on what is left of the experts.
    for model, same in ((cut, True), (whole, False)):
        other = remove(
            copy.deepcopy(whole), kept_neurons(neuron_scores(model, images[0], parts=["attention"]))
        )
        pairs = [
            (a.attn.qkv.weight, b.attn.qkv.weight)
            for a, b in zip(other.blocks, first_cut.blocks, strict=True)
        ]
        assert all(torch.equal(*pair) for pair in pairs) == same
    alike = [w1 for w1, *_ in left[False].blocks[0].mlp.experts.each()]
    assert all(torch.equal(alike[0], other) for other in alike), (
        "copies scored on the same images keep the same neurons"
    )


def test_a_pruned_state_with_the_spec_of_a_whole_model_is_refused(where):
    spec = BASE.but(init=HEAD, prune=PRUNE)
    state = load_file(where.state(run(where, spec.but(keep=True)).id))
    assert restored(spec, state, 10, 1).blocks[0].mlp.fc1.out_features == H // 2
    with pytest.raises(ValueError, match="give the spec that it was made with"):
        restored(BASE, state, 10, 1)
    with pytest.raises(
        ValueError,
        match="blocks.0.mlp has 12 groups in the state; of 24 the shares of run .* leave 18",
    ):
        restored(spec.but(prune={"share": 0.25}), state, 10, 1)
    twice = BASE.but(init=spec, prune=PRUNE.but(parts=("mlp",)))
    state = load_file(where.state(run(where, twice).id))
    assert restored(twice, state, 10, 1).blocks[0].mlp.fc1.out_features == H // 4
    with pytest.raises(
        ValueError, match="blocks.0.mlp has 6 groups in the state; of 24 .* leave 12"
    ):
        restored(twice.but(init=BASE.but(init=HEAD), prune=PRUNE), state, 10, 1)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "mixture"])
def test_one_order_over_the_model_leaves_layers_unequal_and_is_restored(where, moe):
    spec = BASE.but(init=HEAD, moe=moe, prune=PRUNE.but(order="model", share=0.8))
    child = BASE.but(init=spec, moe=moe, train={"epochs": 0.5})
    record = run(where, child)
    pruned = where.get(spec).prune
    # experts and the rest are cut to the share one after the other, each to half a unit
    unit = max(2 * D + 1, HEADS * (3 * (D + 1) + D))
    assert abs(pruned["after"] / pruned["before"] - 0.2) <= unit / pruned["before"]
    state = load_file(where.state(child.id))
    assert state["blocks.0.attn.qkv.weight"].shape != state["blocks.1.attn.qkv.weight"].shape
    for whose in (spec, child):
        model = restored(whose, state, 10, 1)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    if moe is not None:
        assert len({w for block in model.blocks for w in block.mlp.experts.widths}) > 1
    assert record.cost["params_stored"] == where.get(spec).cost["params_stored"]


def test_the_unstructured_arm_keeps_its_zeros_and_its_size(where):
    record = run(where, BASE.but(init=HEAD, prune=PRUNE.but(structured=False, share=0.75)))
    state, whole = load_file(where.state(record.id)), where.get(HEAD)
    assert record.cost == whole.cost
    for block in range(DEPTH):
        for part in ("mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj"):
            weight = state[f"blocks.{block}.{part}.weight"]
            assert (weight == 0).float().mean().item() == pytest.approx(0.75)
    assert record.prune["after"] == record.prune["before"] / 4


def test_same_spec_twice_and_parts(where, tmp_path):
    spec = BASE.but(init=HEAD, prune=PRUNE.but(parts=("attention",), kind="random"))
    record = run(where, spec)
    again = run(Store(tmp_path / "other", tmp_path / "elsewhere"), spec)
    assert record.weights == again.weights
    state = load_file(where.state(spec.id))
    assert state["blocks.0.mlp.fc1.weight"].shape == (H, D) and state[
        "blocks.0.attn.qkv.weight"
    ].shape == (3 * D // 2, D)


@pytest.mark.parametrize(
    "trainable, moves",
    [
        ("head", lambda name: name.startswith("head.")),
        ("no_attention", lambda name: ".attn." not in name),
        ("all", lambda name: True),
    ],
)
def test_what_trains(trainable, moves):
    spec = BASE.but(train={"trainable": trainable})
    splits, model = load_splits(spec.data), build(spec, 10, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loop.fit(model, splits.train, None, spec)
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {name for name in before if moves(name)}


@pytest.mark.parametrize(
    "prune, says",
    [
        ({"share": 0.99}, r"blocks.0.mlp: share=0.99 of 24 leaves nothing"),
        (
            {"share": 0.95, "parts": ("attention",)},
            r"blocks.0.attn.qk: share=0.95 of 8 leaves nothing",
        ),
        ({"parts": ("experts",)}, "has no experts to prune"),
        ({"share": 0.99, "order": "model"}, "at most 0.9104 of the weights can go"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_any_work(where, prune, says):
    with pytest.raises(ValueError, match=says):
        run(where, BASE.but(prune=PRUNE.but(**prune)))
    assert not list(where.private.rglob("*.json"))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: PruneSpec(share=1.0), "share"),
        (lambda: PruneSpec(images=4, batches=8), "batches=8 cannot be cut out of images=4"),
        (
            lambda: PruneSpec(structured=False, kind="magnitude"),
            "set kind='taylor', got 'magnitude'",
        ),
        (
            lambda: PruneSpec(structured=False, order="model"),
            "structured=False does not remove: set order='layer'",
        ),
        (
            lambda: BASE.but(prune=PRUNE, train={"mask": MaskSpec(width=16, heads=2)}),
            "pruning scores a classifier",
        ),
        (
            lambda: BASE.but(init=BASE.but(prune=PRUNE.but(structured=False))),
            "which a further stage would lose",
        ),
    ],
)
def test_bad_specs(make, says):
    with pytest.raises(ValidationError, match=says):
        make()
