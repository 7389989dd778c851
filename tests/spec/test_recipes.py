"""Methods of several stages: which run starts from which, and what changes on the way."""

from __future__ import annotations

import pytest

from lib.spec import (
    ChannelSpec,
    DataSpec,
    ExtractSpec,
    MaskSpec,
    MoESpec,
    PruneSpec,
    RunSpec,
    TrainSpec,
    class_groups,
    recipes,
)

DENSE = RunSpec(
    moe=MoESpec(
        layers=2, experts=4, top_k=4, router="token", balance="none", sharpness_weight=1e-3
    ),
    seed=3,
    train=TrainSpec(epochs=6.0, lr=1e-3),
)


def line(run):
    """A run and those that it starts from, the last one first."""
    return [run, *line(run.init)] if run.init is not None else [run]


def test_pretraining_starts_from_nothing_and_keeps_the_model():
    mask = MaskSpec(width=16, depth=1, heads=2)
    start = recipes.pretrained(DENSE.but(init=RunSpec()), mask, epochs=20.0)
    assert start == DENSE.but(train={"mask": mask, "epochs": 20.0}) and start.init is None


def test_dense_to_sparse_in_three_stages():
    free, gate, dense = line(recipes.made_sparse(DENSE, 1.2, 4.8))
    assert dense == DENSE
    assert gate.moe == free.moe == DENSE.moe.but(top_k=1) and gate.seed == free.seed == 3
    assert (gate.train.trainable, gate.train.distil, gate.train.epochs, gate.fresh_routers) == (
        "routers",
        "choice",
        1.2,
        True,
    )
    assert (free.train.trainable, free.train.distil, free.train.epochs, free.fresh_routers) == (
        "all",
        "none",
        4.8,
        False,
    )
    assert free.train.lr == DENSE.train.lr
    assert line(recipes.made_sparse(DENSE, 1.2, 4.8, target="none"))[1].train.distil == "none"


def test_a_random_gate_keeps_the_experts_and_trains_nothing():
    *_, teacher, dense = line(recipes.made_sparse(DENSE, 1.2, 4.8, random_gate=True))
    assert teacher == DENSE.but(init=DENSE, fresh_routers=True, train=None) and dense == DENSE


def test_warm_up_routes_by_class_and_is_cut_once():
    moe = MoESpec(
        layers=2,
        blocks=(1, 3),
        experts=4,
        top_k=2,
        router="token",
        shared=True,
        balance_weight=0.1,
        copy_noise=0.2,
    )
    run, groups = (
        RunSpec(moe=moe, prune=PruneSpec(), train=TrainSpec(epochs=4.0)),
        class_groups(10, 4),
    )
    after, warm = line(recipes.warmed_up(run, groups, 0.25))
    assert warm.moe.router == "manual" and warm.moe.groups == groups and warm.moe.balance == "none"
    assert (warm.moe.blocks, warm.moe.experts, warm.moe.shared) == ((1, 3), 4, True)
    assert warm.moe.copy_noise == 0.2, "copies differ from their first step on"
    assert warm.prune == PruneSpec() and after.prune is None and after.moe == moe
    assert (warm.train.epochs, after.train.epochs) == (1.0, 3.0)
    after, before = line(recipes.warmed_up(run, groups, 0.25, on_top=True))
    assert before == warm and after.train.epochs == 4.0, "the run keeps all of its passes"
    learns = {"noise": 1.0, "gate": "renormalised", "z_weight": 1e-3}
    after, again = line(recipes.warmed_up(run.but(moe=learns), groups, 0.25))
    assert again.moe == warm.moe and after.moe == moe.but(**learns)  # by hand nothing is learnt
    with pytest.raises(ValueError, match="groups names 2 experts"):
        recipes.warmed_up(run, ((0,), (1,)), 0.5)


def test_experts_come_out_of_the_dense_run_and_are_finetuned_with_its_logits():
    dense = RunSpec(data=DataSpec(train=400), train=TrainSpec(epochs=6.0, lr=1e-3), threads=2)
    base = RunSpec(study="moee", init=dense, train=TrainSpec(epochs=1.0))
    assert recipes.dense_of(base) == recipes.dense_of(dense) == dense
    rules = ExtractSpec(neurons={"active": 0.5})
    run = recipes.extracted(base, rules, 3, images=50)
    assert run == dense.but(study="moee", init=dense, extract=rules, train=None, seed=3)
    tuned = recipes.extracted(base, rules, 3, epochs=2.0, images=50, one_thread=True)
    assert (tuned.extract, tuned.init, tuned.data.train, tuned.threads) == (rules, dense, 50, 1)
    assert tuned.train == dense.train.but(epochs=2.0, lr=2e-4, distil_logits=0.5)
    assert recipes.extracted(base, rules, 3, epochs=2.0).data.train is None
    changes = ({"neurons": {"active": 0.3}}, {"router": "nearest"}, {"neurons": {"active": 0.4}})
    changed = recipes.extracted(base, rules, 3, changes)
    assert changed == run.but(extract=rules.but(neurons={"active": 0.4}, router="nearest"))
    on_card = base.but(init=dense.on("cuda"))
    assert recipes.extracted(on_card, rules, 3, one_thread=True).threads == 2


def test_one_pass_learns_from_the_dense_model_alone_at_rates_of_its_own():
    dense = RunSpec(data=DataSpec(train=400), train=TrainSpec(epochs=6.0, lr=1e-3, layer_decay=0.7))
    base = RunSpec(study="moee", init=dense, train=TrainSpec(epochs=1.0))
    run = recipes.extracted(base, ExtractSpec(neurons={"active": 0.5}), 3)
    taught = recipes.distilled(run, 0.25, 0.75, 2e-4, 0.9)
    assert taught.but(train=None, dtype=run.dtype) == run and taught.dtype == "bfloat16"
    asked = {"epochs": 0.25, "lr": 2e-4, "layer_decay": 0.9}
    targets = {"distil_logits": 1.0, "distil_stream": 0.75}
    assert taught.train == dense.train.but(**asked, **targets)


def test_channels_are_evaluated_on_the_dense_model():
    dense = RunSpec(study="foundations", train=TrainSpec(), threads=2)
    base = dense.but(init=dense, study="moee")
    run = recipes.with_channels(base, 3, active=0.5, batch=64)
    assert run.init == dense and run.channels == ChannelSpec(active=0.5, batch=64)
    assert (run.train, run.seed, run.threads, run.study) == (None, 3, 1, "moee")
    on_card = recipes.with_channels(dense.on("cuda"), 0, active=0.5, pool="image")
    assert (on_card.init, on_card.threads) == (dense.on("cuda"), 2)
