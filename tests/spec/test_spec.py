"""Specs: what is refused, and which changes change an id."""

import json
from typing import ClassVar

import pytest
from pydantic import ValidationError

from lib.spec import ROUTERS, BackboneSpec, DataSpec, MoESpec, RunSpec, Spec, TrainSpec, sentence


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MoESpec(experts=2, top_k=4), "top_k=4 needs at least 4 experts, got experts=2"),
        (lambda: MoESpec(router="all", experts=3), "set top_k=3, got 1"),
        (
            lambda: MoESpec(router="image", capacity_factor=1.0),
            "capacity_factor=1.0 is for router='token'",
        ),
        (
            lambda: MoESpec(router="token", choices=2.0),
            "choices=2.0 is for router='expert_choice'; router='token' does not take it: "
            "leave it at 1.0",
        ),
        (
            lambda: MoESpec(router="soft", expert_dropout=0.5),
            "expert_dropout=0.5 is for router='token', .* or 'manual'; router='soft'",
        ),
        (lambda: MoESpec(router="manual"), "router='manual' needs groups"),
        (
            lambda: MoESpec(router="token", experts=4, members=3),
            "members=3 must divide experts=4",
        ),
        (
            lambda: MoESpec(router="token", compete_rate=0.5, noise=1.0),
            "without noise: set noise=0, got noise=1.0",
        ),
        (lambda: MoESpec(expertz=2), "expertz"),
        (
            lambda: MoESpec(layers=2, blocks=(3, 1)),
            "must be layers=2 different numbers in rising order",
        ),
        (lambda: MoESpec(layers=2, blocks=(3,)), "must be layers=2 different numbers"),
        (lambda: MoESpec(layers=2, blocks=(0, 3)), "blocks"),
        (lambda: MoESpec(layers=2, balance_weights=(0.1,)), "has 1 values: it takes layers=2"),
        (
            lambda: MoESpec(balance="none", balance_weights=(0.1,)),
            "with balance='switch', got balance='none'",
        ),
        (lambda: MoESpec(copy_noise=0.1, fresh_experts=True), "copy_noise is added to copies"),
        (lambda: MoESpec(layers=0), "layers"),
        (lambda: MoESpec(experts="8"), "experts"),
        (lambda: MoESpec(experts=8.0), "experts"),
        (lambda: MoESpec(noise=float("nan")), "noise"),
        (lambda: MoESpec(router="tokens"), "'token', 'image', 'all', 'expert_choice'"),
        (lambda: BackboneSpec(width=30, heads=4), "heads=4 must divide width=30"),
        (lambda: BackboneSpec(drop_path=1.0), "drop_path"),
        (lambda: TrainSpec(epochs=0), "epochs"),
        (lambda: TrainSpec(layer_decay=1.5), "layer_decay"),
        (lambda: RunSpec(dtype="float16"), "float32"),
        (lambda: RunSpec(image_loads=True), "image_loads .* set moe with members=1"),
        (
            lambda: RunSpec(image_loads=True, moe=MoESpec(router="token", experts=4, members=2)),
            "image_loads .* set moe with members=1",
        ),
        (
            lambda: RunSpec(init=RunSpec(backbone=BackboneSpec(depth=3))),
            "init must have the same backbone",
        ),
    ],
)
def test_refused(make, words):
    with pytest.raises(ValidationError, match=words):
        make()


@pytest.mark.parametrize(
    "make, says",
    [
        # what ended in a traceback or a dead process once
        (lambda: RunSpec(seed=10**20), "seed=100000000000000000000: it should be less than 42949"),
        (lambda: RunSpec(seed=-1), "seed=-1: it should be greater than or equal to 0"),
        (lambda: RunSpec(threads=100_000), "threads=100000: it should be less than or equal to 10"),
        (lambda: RunSpec(moe={"experts": 2**63}), "moe.experts=9223372036854775808: it should be"),
        (lambda: RunSpec(train={"epochs": 1e18}), "train.epochs=1e+18: it should be less than or"),
        (lambda: RunSpec(train={"layer_decay": 1e-300}), "train.layer_decay=1e-300: it should be"),
        (lambda: RunSpec(train={"lr": 1e-300}), "train.lr=1e-300: it should be greater than or e"),
        (lambda: MoESpec(router="token", capacity_factor=1e300), "capacity_factor=1e+300: it sho"),
        (lambda: BackboneSpec(depth=10**9), "depth=1000000000: it should be less than or equal to"),
        (
            lambda: MoESpec(router="manual", experts=1, groups=((-1,),)),
            "groups.0.0=-1: it should be greater than or equal to 0",
        ),
        # two faults are two reasons
        (
            lambda: RunSpec(moe={"top_k": 0}, seed="1"),
            "moe.top_k=0: it should be greater than or equal to 1; "
            "seed='1': it should be a valid integer",
        ),
        (lambda: RunSpec(moe={"top_k": 9}), "moe: top_k=9 needs at least 9 experts, got experts=8"),
        # what the data set ignores
        (
            lambda: DataSpec(label="fine_label"),
            "label='fine_label' names a column, and mnist5k has",
        ),
        (lambda: DataSpec(subset_seed=1), "subset_seed=1 would choose nothing"),
        (lambda: DataSpec(classes=(5, 5)), "classes=(5, 5): give the first class and one past"),
        # names that are none
        (lambda: RunSpec(sed=1), "sed=1: there is no such field; near it: seed, shared"),
        (lambda: RunSpec(moe={"top-k": 1}), "moe.top-k=1: there is no such field; near it: top_k"),
        (lambda: RunSpec(zz=[1]), "zz=[1]: there is no such field"),
        # what a parent has and its child has not
        (
            lambda: RunSpec(
                backbone={"width": 64}, init=RunSpec(backbone=BackboneSpec(depth=3, drop_path=0.5))
            ),
            "init must have the same backbone as the run that starts from it, and differs in width "
            "(None, here 64), depth (3, here None)",
        ),
    ],
)
def test_a_refusal_is_one_sentence_with_field_value_and_what_is_valid(make, says):
    with pytest.raises(ValidationError) as error:
        make()
    assert sentence(error.value).startswith(says)


NO_FOLDERS = ["", "/etc", "../../x", "a/../b", "a//b", "a/", ".", "a\0b", "a\nb", "<b>", "`x`"]
NO_FOLDERS += ["\ud800", "x" * 201]


@pytest.mark.parametrize("name", [*NO_FOLDERS, "a b", "[1]", "über", "a\\b"])
def test_names_that_are_no_folder_of_the_store(name):
    for make in (lambda: RunSpec(study=name), lambda: BackboneSpec(name=name)):
        with pytest.raises(ValidationError, match="study|name"):
            make()
    assert RunSpec(study="vimoe/small_2.1").study == "vimoe/small_2.1"


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_names_that_are_no_data_set_and_no_weights(name):
    for make in (lambda: DataSpec(name=name), lambda: BackboneSpec(weights=name)):
        with pytest.raises(ValidationError, match="name"):
            make()
    for fine in ("photos [1]", "über uns", "hub:owner/name", "a/b", "x" * 200):
        assert DataSpec(name=fine, label="class of the picture").name == fine
    assert BackboneSpec(weights="file:dino/vit.safetensors@0f").weights[:5] == "file:"
    for kind in ("file:", "pth:"):
        with pytest.raises(ValidationError, match="name"):
            BackboneSpec(weights=kind + name)


@pytest.mark.parametrize(
    "word, given",
    [
        ("all", {"experts": 2, "top_k": 2}),
        ("manual", {"experts": 2, "groups": ((0,), (1,))}),
    ],
)
@pytest.mark.parametrize(
    "asked, says",
    [
        ({}, "got balance='switch'"),  # the default
        ({"balance": "switch", "balance_weights": (0.1,)}, "got balance='switch'"),
        ({"balance": "none", "z_weight": 1e-3}, "balance='none', z_weight=0.001"),
        ({"balance": "none", "sharpness_weight": 1e-3}, "balance='none', sharpness_weight=0.001"),
        ({"balance": "none", "variation_weight": 1e-3}, "balance='none', variation_weight=0.001"),
    ],
)
def test_no_loss_can_be_asked_of_a_router_that_learns_nothing(word, given, asked, says):
    says = f"router='{word}' has nothing to learn.*set balance='none'.*{says}"
    with pytest.raises(ValidationError, match=says):
        MoESpec(router=word, **given, **asked)
    silent = MoESpec(router=word, **given, balance="none")
    assert not silent.learns and MoESpec().learns


def test_every_field_that_a_router_takes_exists():
    for word, router in ROUTERS.items():
        assert router.takes <= MoESpec.model_fields.keys() | TrainSpec.model_fields.keys(), word
        assert router.needs <= router.takes


def test_frozen_and_closed():
    with pytest.raises(ValidationError, match="frozen"):
        MoESpec().experts = 4
    with pytest.raises(ValidationError, match="expertz"):
        MoESpec().but(expertz=4)


def test_ids_are_stable():
    """Pinned: a change here orphans every record there is. Bump `semantics` instead where a result
    would change."""
    assert RunSpec().id == "a3674d0c3d7f1371"
    assert (
        RunSpec(
            data=DataSpec(name="cifar100", image_size=56, label="fine_label"),
            moe=MoESpec(layers=2, shared=True),
            train=TrainSpec(layer_decay=0.65),
            seed=1,
            dtype="bfloat16",
        ).id
        == "d600bde4081565a9"
    )


def test_defaults_are_not_hashed():
    assert MoESpec(experts=8, top_k=1) == MoESpec() and MoESpec(experts=8).canonical() == {
        "semantics": 1
    }
    assert RunSpec(seed=0, threads=2).id == RunSpec().id != RunSpec(seed=1).id

    class Grown(MoESpec):
        later: int = 5

    assert Grown().id == MoESpec().id != Grown(later=6).id


def test_filing_is_not_hashed():
    assert RunSpec(study="vimoe", keep=True).id == RunSpec().id
    parent = RunSpec(study="vimoe", keep=True)
    assert RunSpec(init=parent).id == RunSpec(init=RunSpec()).id != RunSpec().id


def test_semantics_are_hashed():
    class Bumped(MoESpec):
        semantics: ClassVar[int] = 2

    assert Bumped().id != MoESpec().id
    assert RunSpec(moe=Bumped()).id != RunSpec(moe=MoESpec()).id

    class BumpedData(DataSpec):
        semantics: ClassVar[int] = 2

    # Also where the part is at its default.
    assert RunSpec(data=BumpedData()).id != RunSpec(data=DataSpec()).id == RunSpec().id


def test_canonical_is_json_and_round_trips():
    spec = RunSpec(
        moe=MoESpec(layers=2, capacity_factor=1.5, router="token"),
        init=RunSpec(seed=3),
        train=TrainSpec(),
    )
    assert json.loads(json.dumps(spec.canonical())) == spec.canonical()
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_but():
    spec = RunSpec(moe=MoESpec(layers=2))
    changed = spec.but(seed=4, moe={"experts": 4}, data={"image_size": 56})
    assert (changed.seed, changed.moe, changed.data.image_size) == (
        4,
        MoESpec(layers=2, experts=4),
        56,
    )
    assert spec.but(moe=None).moe is None and spec.seed == 0
    with pytest.raises(ValidationError, match="top_k=3 needs at least 3"):
        spec.but(moe={"experts": 2, "top_k": 3})
    assert isinstance(spec, Spec)


MIXTURE = RunSpec(moe=MoESpec(experts=4, router="token"), train=TrainSpec())


def distilled(target, parent=MIXTURE, train=None, **changes):
    return parent.but(init=parent, train={"distil": target} | (train or {}), **changes)


@pytest.mark.parametrize(
    "make, says",
    [
        (
            lambda: distilled("probabilities", MIXTURE.but(moe={"members": 2})),
            "distil='probabilities' compares all experts.*members=2.*distil='choice'",
        ),
        (
            lambda: distilled("probabilities", train={"single_expert_at": 0.5}),
            "distil='probabilities' asks for experts that single_expert_at drops",
        ),
        (
            lambda: distilled("choice", train={"single_expert_at": 1.0}),
            "distil='choice' asks for experts that single_expert_at drops",
        ),
        (
            lambda: distilled("choice", drop={"share": 0.5, "score": "load", "missing": "reroute"}),
            "drop.missing='reroute' takes rows out of the router",
        ),
        (
            lambda: distilled("probabilities", MIXTURE.but(moe=MoESpec(router="soft"))),
            "teaches the logits of a router, and router='soft' has none",
        ),
        (
            lambda: distilled(
                "choice",
                MIXTURE.but(moe=MoESpec(router="all", experts=2, top_k=2, balance="none")),
            ),
            "router='all' has none",
        ),
        (
            lambda: RunSpec(train={"mask": {}, "trainable": "head"}),
            "a mask has no head, so trainable='head' leaves nothing to train",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_before_any_work(make, says):
    with pytest.raises(ValidationError, match=says):
        make()


def test_a_choice_is_distilled_inside_the_group_of_each_member():
    assert distilled("choice", MIXTURE.but(moe={"members": 2})).train.distil == "choice"
    assert distilled("probabilities", drop={"share": 0.5, "score": "load"}).drop is not None
