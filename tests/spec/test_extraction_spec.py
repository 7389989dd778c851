"""Rules of extraction that do not fit together are refused by name."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from small_mlps import (
    OF_NEURONS,
    STATIC,
    rules,
)

from lib.spec import ClusterSpec, ExtractSpec, MoESpec, RunSpec, TrainSpec

DENSE = RunSpec(train=TrainSpec())
EXTRACTED = DENSE.but(init=DENSE, train=None, extract=rules())


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: ExtractSpec(neurons={}), "give one of variance_percent and active"),
        (
            lambda: ExtractSpec(neurons={"variance_percent": 50.0, "active": 0.5}),
            "give one of variance_percent and active",
        ),
        (lambda: ExtractSpec(neurons={"variance_percent": 0.0}), "percent"),
        (lambda: ExtractSpec(neurons={"variance_percent": 101.0}), "percent"),
        (
            lambda: ExtractSpec(neurons={"active": 0.5, "common": 0.5}),
            "common=0.5 must be below active=0.5",
        ),
        (
            lambda: ExtractSpec(
                neurons={"active": 0.5}, correction={"method": "ridge"}, storage="shared"
            ),
            "storage='shared' is for experts",
        ),
        (
            lambda: ExtractSpec(neurons={"active": 0.5}, clusters=STATIC, storage="inputs"),
            "storage='inputs' is for experts that share neurons",
        ),
        (
            lambda: ExtractSpec(neurons={"active": 0.5}, router="trained"),
            "router='trained' learns which clusters of neurons",
        ),
        (
            lambda: ExtractSpec(
                neurons={"active": 0.5}, clusters=OF_NEURONS, correction={"method": "mean"}
            ),
            "removes no neuron",
        ),
        (
            lambda: ExtractSpec(
                neurons={"active": 0.5}, clusters=OF_NEURONS, correction={"head": 0.1}
            ),
            "removes no neuron",
        ),
        (lambda: rules(correction={"head": 0.0}), r"correction\.head\n.*greater than or equal"),
        (
            lambda: ExtractSpec(neurons={"variance_percent": 50.0, "budget": "model"}),
            "need active, not variance_percent",
        ),
        (
            lambda: rules(neurons={"budget": "model", "common": 0.25}),
            "common is a share of each layer's neurons",
        ),
        (
            lambda: rules(
                neurons={"budget": "model", "score": "update"}, correction={"method": "ridge"}
            ),
            "residual stream, which is followed in sequence only",
        ),
        (
            lambda: rules(correction={"catch_up": 0.5}),
            "error that changed layers have left behind: set sequential=True",
        ),
        (lambda: ClusterSpec(of="nothing", count=4), "of='nothing' clusters no tokens, so count"),
        (
            lambda: ClusterSpec(of="neurons", count=4, space="input"),
            "of='neurons' clusters no tokens, so space would say nothing",
        ),
        (
            lambda: ClusterSpec(of="nothing", class_token="apart"),
            "of='nothing' clusters no tokens, so class_token would say nothing",
        ),
        (
            lambda: ClusterSpec(method="kmeans", noise="nearest"),
            "noise='nearest' is for tokens that HDBSCAN leaves in no cluster",
        ),
        (
            lambda: ClusterSpec(method="random", class_token="left_out"),
            "class_token='left_out' needs clusters that are found among the other tokens",
        ),
        (lambda: rules(clusters=STATIC, router="nearest"), "without a router"),
        (lambda: rules(clusters=STATIC, neurons={"common": 0.25}), "without a router"),
        (lambda: rules(clusters=STATIC, correction={"pooled": 0.5}), "without a router"),
        (
            lambda: rules(clusters=OF_NEURONS, router="nearest"),
            "clusters.of='neurons' takes 'trained' or 'cosine'",
        ),
        (
            lambda: rules(clusters=OF_NEURONS, neurons={"variance_percent": 50.0}),
            "set neurons.active, not variance_percent",
        ),
        (
            lambda: DENSE.but(extract=ExtractSpec(neurons={"active": 0.5})),
            "extract takes experts from the MLPs of a trained model",
        ),
        (
            lambda: EXTRACTED.but(moe=MoESpec()),
            "extract takes experts from the MLPs of a trained model",
        ),
        (
            lambda: EXTRACTED.but(init=EXTRACTED),
            "extract takes experts from the MLPs of a trained model",
        ),
    ],
)
def test_bad_specs(make, says):
    with pytest.raises(ValidationError, match=says):
        make()


@pytest.mark.parametrize(
    "name, target", [("distil_logits", "prediction"), ("distil_stream", "residual stream")]
)
def test_a_target_needs_one_parent_that_gives_it(name, target):
    with pytest.raises(ValidationError, match=f"{name} needs a parent to learn from: set init"):
        DENSE.but(train={name: 0.5})
    asked = {"init": DENSE.but(keep=True), "train": {name: 0.5}}
    says = f"{name}=0.5 asks for one {target} an image, and moe.members=2 make one each"
    with pytest.raises(ValidationError, match=says):
        DENSE.but(**asked, moe=MoESpec(router="token", members=2))
    assert getattr(DENSE.but(**asked).train, name) == 0.5
