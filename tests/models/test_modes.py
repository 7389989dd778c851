"""What takes the place of a module takes over its mode, device and type: a model in evaluation
mode stays in it, whatever is done to it."""

from __future__ import annotations

import pytest
import timm
import torch

from lib.extraction.extract import extract
from lib.extraction.saved import fit_extracted
from lib.inputs.splits import load_splits
from lib.models.ensemble import ensemble
from lib.models.mae import MaskedAutoencoder
from lib.models.upcycle import upcycle
from lib.pruning.experts.dropping import drop_experts
from lib.pruning.experts.merging import dern, merge_similar
from lib.pruning.experts.progressive import ProgressiveDrop
from lib.pruning.neurons.removal import remove
from lib.pruning.neurons.scores import keep_indices, neuron_scores
from lib.spec import DataSpec, ExtractSpec, MaskSpec, MoESpec, NeuronSpec, RunSpec

VIT = {
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "in_chans": 1,
}
X = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
DATA = DataSpec(train=60, val=20, test=20)


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT)


def mixture(**options):
    noisy = {"layers": 2, "experts": 4, "router": "token", "noise": 3.0, "top_k": 2} | options
    return upcycle(vit().eval(), MoESpec(**noisy))


def extracted(model, **rules):
    clusters = {"method": "kmeans", "count": 3} | rules.pop("clusters", {})
    rules = ExtractSpec(
        neurons=NeuronSpec(active=0.5),
        clusters=clusters,
        calibration={"images": 40},
        **rules,
    )
    spec = RunSpec(data=DATA, extract=rules, init=RunSpec(data=DATA))
    extract(model, spec, load_splits(DATA).train, 10)
    return model


def read_again(model):
    rules = ExtractSpec(neurons=NeuronSpec(active=0.5), clusters={"method": "kmeans", "count": 3})
    return fit_extracted(model, extracted(vit()).state_dict(), rules)


def after_progressive(model):
    drop = ProgressiveDrop(model.train(), 10)
    model.eval()  # the routers that wait for their return do not hear of it
    return drop.finish()


def narrowed(model):
    scores = neuron_scores(model, [(X, torch.arange(4))])
    return remove(model, {name: keep_indices(score, 0.5) for name, score in scores.items()})


SURGERY = {
    "upcycle": lambda: mixture(),
    "upcycle, shared": lambda: mixture(shared=True, expert_dropout=0.5),
    "upcycle, image": lambda: mixture(router="image"),
    "compete": lambda: mixture(noise=0.0, compete_rate=1.0),
    "ensemble": lambda: ensemble(mixture(), 2),
    "autoencoder": lambda: MaskedAutoencoder(mixture(), MaskSpec(width=16, depth=1, heads=2)),
    "drop, zero update": lambda: drop_experts(mixture(), {"blocks.1.mlp": [0, 3]}, "zero_update"),
    "drop, reroute": lambda: drop_experts(mixture(), {"blocks.1.mlp": [0, 3]}, "reroute"),
    "merge": lambda: merge_similar(mixture(), [X], 0.5),
    "dern": lambda: dern(mixture(), [X], 0.5),
    "progressive": lambda: after_progressive(mixture(top_k=1)),
    "neurons": lambda: narrowed(mixture()),
    "extract": lambda: extracted(vit().eval()),
    "extract, common": lambda: extracted(vit().eval(), storage="shared"),
    "extract, neurons": lambda: extracted(
        vit().eval(), clusters={"of": "neurons", "method": "hdbscan", "count": 4}
    ),
    "extract, static": lambda: extracted(
        vit().eval(), clusters={"of": "nothing", "method": "hdbscan", "count": 8}
    ),
    "extract, from a state": lambda: read_again(vit().eval()),
}


@pytest.mark.parametrize("surgery", SURGERY)
def test_a_model_in_evaluation_mode_stays_in_it(surgery):
    model = SURGERY[surgery]()
    assert [name for name, module in model.named_modules() if module.training] == []
    if surgery != "autoencoder":
        with torch.no_grad():
            assert torch.equal(model(X), model(X))


def test_a_model_in_training_stays_in_it():
    model = upcycle(vit(), MoESpec(layers=1, experts=2, router="token", shared=True))
    assert all(module.training for module in model.modules())
    assert all(module.training for module in extracted(vit()).modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_layer_has_the_type_of_the_mlp_before_it(dtype):
    options = {"layers": 1, "experts": 3, "shared": True, "router": "token", "top_k": 2}
    model = upcycle(vit().to(dtype).eval(), MoESpec(**options))
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(X.to(dtype)).dtype == dtype
    assert {p.device.type for p in upcycle(vit().to("meta"), MoESpec(**options)).parameters()} == {
        "meta"
    }
