"""On a graphics card the reference is met, too, runs work, and extractions agree with the CPU's.

Skipped without one.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from small_mlps import OF_NEURONS, STATIC, H, calibration_of, rules, small_mlp
from vits import batch, build
from vits import moe as mixture

from lib.extraction.clusters import density_clusters
from lib.extraction.layer import extract_layer
from lib.extraction.record import LayerCalibration, RecordedTokens, record_tokens
from lib.pages import profiles
from lib.runs import collect as runs
from lib.runs.store import Store
from lib.spec import RunSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")


@pytest.mark.parametrize("gate", ["printed", "renormalised"])
@pytest.mark.parametrize("factor", [None, 0.8])
def test_a_layer_meets_the_reference_in_value_and_gradient(gate, factor):
    moe = build(moe=mixture(top_k=2, gate=gate, capacity_factor=factor)).blocks[1].mlp.cuda()
    x = torch.randn(4, 17, moe.experts.width, device="cuda", requires_grad=True)
    weights = [
        moe.router.weight,
        moe.experts.fc1.weight,
        moe.experts.fc1.bias,
        moe.experts.fc2.weight,
        moe.experts.fc2.bias,
    ]
    chosen = reference.gates(x, weights[0], 2, gate=gate, capacity_factor=factor)
    wanted = reference.moe(x, chosen, *weights[1:])
    given = moe(x)
    assert torch.allclose(given, wanted, atol=1e-4)
    pull = torch.randn_like(wanted)
    mine, theirs = (
        torch.autograd.grad((out * pull).sum(), [x, *weights]) for out in (given, wanted)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"correction": {"method": "ridge"}, "storage": "inputs"},
        {"clusters": STATIC, "correction": {"method": "mean"}},
        {"clusters": {"method": "hdbscan", "smallest_share": 0.1}},
        {"clusters": OF_NEURONS},
    ],
)
def test_an_extracted_layer_is_the_one_that_the_cpu_makes(how):
    mlp = small_mlp()
    calibration, changed_rules = calibration_of(mlp), rules(**how)
    there = LayerCalibration(
        RecordedTokens(
            *(
                part.cuda()
                for part in (
                    calibration.tokens.inputs,
                    calibration.tokens.hidden,
                    calibration.tokens.image,
                    calibration.tokens.place,
                )
            )
        ),
        calibration.target.cuda(),
    )
    wanted, told = extract_layer(
        copy.deepcopy(mlp), calibration, changed_rules, round(0.5 * H), seed=0
    )
    made, report = extract_layer(
        copy.deepcopy(mlp).cuda(), there, changed_rules, round(0.5 * H), seed=0
    )
    x = calibration.tokens.inputs.unsqueeze(0)
    assert torch.allclose(made.cuda()(x.cuda()).cpu(), wanted(x), atol=1e-4)
    assert report["widths"] == told["widths"] and np.allclose(report["load"], told["load"])


def test_tokens_stay_on_the_card_and_cluster_there():
    model = build()
    images = batch(40)[0]
    here = record_tokens(model, images.split(8), per_image=9, limit=200, seed=0)
    there = record_tokens(model.cuda(), images.cuda().split(8), per_image=9, limit=200, seed=0)
    for name, found in here.items():
        assert there[name].hidden.is_cuda and torch.allclose(
            there[name].hidden.cpu(), found.hidden, atol=1e-2
        )
        assert torch.equal(there[name].image.cpu(), found.image)
    x = found.hidden
    assert np.array_equal(density_clusters(x.cuda(), 5).labels, density_clusters(x, 5).labels)


def moved(spec: RunSpec, device: str) -> RunSpec:
    return spec.but(
        device=device, **({} if spec.init is None else {"init": moved(spec.init, device)})
    )


@pytest.mark.parametrize(
    "key, name", [("expert_pruning/vision", "whole"), ("leiden/why", "forestnet: moe, 95% pruned")]
)
def test_a_run_ends_near_the_one_on_the_cpu(key, name, tmp_path):
    where = Store(tmp_path / "published", tmp_path / "cache")
    [spec] = profiles.plan(key, "smoke")[name][:1]
    made = {
        device: runs.collect({"run": [moved(spec, device)]}, where=where)["run"][0]
        for device in ("cpu", "cuda")
    }
    assert made["cuda"].environment["accelerator"] == torch.cuda.get_device_name()
    assert made["cuda"].cost == pytest.approx(made["cpu"].cost, rel=0.02)
    assert made["cuda"].test["loss"] == pytest.approx(made["cpu"].test["loss"], rel=0.05)


def wide(spec: RunSpec) -> RunSpec:
    """The run and its parent with a model that is large against what libraries hold."""
    shape = {"width": 192, "heads": 3, "hidden": 768, "depth": 6}
    return spec.but(
        backbone=shape, init=spec.init.but(backbone=shape), resident=True, cam_probe=False
    )


def test_a_pruned_model_needs_less_of_the_card(tmp_path):
    where = Store(tmp_path / "published", tmp_path / "cache")
    planned = profiles.plan("leiden/why", "smoke", device="cuda")
    made = runs.collect(
        {cut: [wide(planned[f"forestnet: moe, {cut} pruned"][0])] for cut in ("0%", "95%")},
        where=where,
    )
    assert made["95%"][0].memory["cuda"] < made["0%"][0].memory["cuda"]
