"""Experts extracted from a model by a loader: equal to dense where nothing is removed, stored once,
refused by name."""

from __future__ import annotations

import pytest
import torch
from small_classifier import (
    NAMES,
    H,
    Wrapped,
    images_and_labels,
    loader,
    same_state,
    state_of,
    vit,
)

import lib
from lib.api.loaders import calibration_images
from lib.extraction.extract import extract_layers
from lib.models.moe import MoELayer
from lib.models.shared_experts import SharedExperts
from lib.spec import ExtractSpec

IMAGES, _ = images_and_labels()


def output(model):
    with torch.no_grad():
        return model(IMAGES)


def megabytes(model):
    return sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize("clusters", ["kmeans", "hdbscan", "random"])
@pytest.mark.parametrize("storage", ["shared", "copies"])
def test_all_neurons_are_the_dense_function_through_experts(clusters, storage):
    model = vit()
    same = lib.extract(model, loader(), 1.0, clusters=clusters, count=3, storage=storage)
    torch.testing.assert_close(output(same), output(model), atol=1e-5, rtol=0)
    assert all(isinstance(block.mlp, MoELayer) for block in same.blocks)
    with torch.no_grad(), lib.RoutingTape(same) as tape:
        same(IMAGES)
    assert all((routing.load() > 0).sum() >= 2 for routing in tape.routings())


def test_shared_storage_is_the_same_function_and_smaller():
    for repair, own_outputs in (("ridge", True), ("mean", False), ("none", False)):
        shared, copies = (
            lib.extract(vit(), loader(), 0.5, count=4, repair=repair, storage=storage)
            for storage in ("shared", "copies")
        )
        torch.testing.assert_close(output(shared), output(copies), atol=1e-5, rtol=0)
        experts = shared.blocks[0].mlp.experts
        assert isinstance(experts, SharedExperts) and experts.own_output_weights == own_outputs
        assert megabytes(shared) < megabytes(copies)
        assert (megabytes(shared) < 1.05 * megabytes(vit())) == (not own_outputs)


def test_repair_brings_the_model_nearer_to_the_dense_one():
    dense, far = output(vit()), []
    for repair in (None, "mean", "none"):
        extracted = lib.extract(vit(), loader(), 0.3, count=3, repair=repair)
        far.append((output(extracted) - dense).square().mean().item())
    assert far == sorted(far) and far[0] < 0.5 * far[2]


def test_as_published_is_the_plain_reading_of_the_paper():
    mine, plain = lib.extract(vit(), loader(), 0.5, clusters="moee", storage="copies"), vit()
    images = [part for part, _ in calibration_images(loader(), plain, 512, 0)]
    rows = extract_layers(plain, images, ExtractSpec(neurons={"active": 0.5}), 0)
    assert same_state(mine, state_of(plain))
    asked = {"clusters_by": "moee", "repair": "none", "storage": "copies"}
    assert mine.extraction == [row | asked for row in rows]


def test_clusters_of_neurons_pass_a_share_of_the_experts():
    model = vit()
    extracted = lib.extract(model, loader(), 0.5, clusters="moefication", count=4)
    router = extracted.blocks[0].mlp.router
    assert (router.experts, router.top_k) == (4, 2)
    whole = lib.extract(model, loader(), 1.0, clusters="moefication", count=4)
    torch.testing.assert_close(output(whole), output(model), atol=1e-5, rtol=0)


def test_what_a_layer_tells_and_what_is_left_alone():
    model = vit()
    state, modes = state_of(model), [module.training for module in model.modules()]
    extracted = lib.extract(model, loader(), 0.5, count=3, ignore=["blocks.0"])
    assert same_state(model, state) and [m.training for m in model.modules()] == modes
    [row] = extracted.extraction
    assert row["layer"] == NAMES[1] and row["clusters"] == 3 and row["widths"] == [H // 2] * 3
    assert row["storage"] == "inputs" and sum(row["load"]) == pytest.approx(1)
    assert torch.equal(extracted.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert lib.extract(model, loader(), 0.5, count=3, inplace=True) is model
    assert len(model.extraction) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_and_types_stay(dtype):
    model = vit().to(dtype)
    model.blocks[1].train()
    extracted = lib.extract(model, loader(dtype), 0.5, count=3)
    assert [b.mlp.training for b in extracted.blocks] == [False, True]
    assert all(parameter.dtype == dtype for parameter in extracted.parameters())
    assert extracted(IMAGES.to(dtype)).dtype == dtype


def test_a_module_of_ones_own_around_a_trunk():
    model = Wrapped(vit()).eval()
    same = lib.extract(model, loader(), 1.0, count=3)
    torch.testing.assert_close(output(same), output(model), atol=1e-5, rtol=0)
    half = lib.extract(model, loader(), 0.5, count=3)
    assert [row["layer"] for row in half.extraction] == [f"trunk.{name}" for name in NAMES]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"clusters": "dbscan"}, "valid are kmeans, hdbscan, random, moee, moefication"),
        ({"repair": "glue"}, "repair='glue' is unknown: valid are ridge, mean, none"),
        ({"storage": "inputs"}, "storage='inputs' is unknown: valid are shared, copies"),
        ({"active": 0}, "active=0: the share that a token passes"),
        ({"active": 80}, "active=80: the share"),
        ({"clusters": "moee", "repair": "ridge"}, "as published, without repair"),
        ({"count": 1}, "clusters.count=1"),
        ({"count": 1000}, "cannot make 1000 clusters"),
        ({"clusters": "moefication", "count": 7}, "do not divide into 7"),
        ({"ignore": ["head"]}, "ignore: 'head' fits none of the layers blocks.0.mlp"),
        ({"ignore": ["blocks"]}, r"ignore=\['blocks'\] leaves no MLP to extract from"),
    ],
)
def test_what_is_refused(options, says):
    model = vit()
    state = state_of(model)
    with pytest.raises(ValueError, match=says):
        lib.extract(model, loader(), **options)
    assert same_state(model, state)


def test_a_mixture_is_refused_by_the_layer():
    mixture = lib.upcycle(vit(), lib.MoESpec(layers=1, experts=2, router="token"))
    with pytest.raises(ValueError, match=r"blocks.1.mlp \(MoELayer\)"):
        lib.extract(mixture, loader())
    extracted = lib.extract(mixture, loader(), count=3, ignore=["blocks.1"])
    assert [row["layer"] for row in extracted.extraction] == NAMES[:1]
