"""What upcycling takes, extraction and pruning take: MLPs without biases, in other types, of a
subclass."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from small_mlps import OF_NEURONS, STATIC, rules
from timm.layers import Mlp

from lib.extraction.extract import extract
from lib.extraction.saved import fit_extracted
from lib.inputs.splits import load_splits
from lib.models.upcycle import upcycle
from lib.pruning.neurons.masks import mask_weights
from lib.pruning.neurons.removal import fit_shapes, remove
from lib.pruning.neurons.scores import keep_indices, neuron_scores
from lib.spec import DataSpec, MoESpec, RunSpec

DATA = DataSpec(train=60, val=20, test=20)
X = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
VIT = {
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "in_chans": 1,
}
RULES = {
    "copies": {},
    "mean": {"correction": {"method": "mean"}},
    "ridge": {"correction": {"method": "ridge"}},
    "common": {"neurons": {"active": 0.5, "common": 0.25}},
    "shared": {"storage": "shared"},
    "inputs": {"storage": "inputs", "correction": {"method": "ridge"}},
    "oracle": {"router": "oracle"},
    "static": {"clusters": STATIC},
    "neurons": {"clusters": OF_NEURONS, "router": "trained"},
    "sequence": {"correction": {"method": "ridge", "sequential": True}},
    "model": {"neurons": {"active": 0.5, "budget": "model", "score": "weighted"}},
    "stays dense": {"clusters": {"method": "hdbscan", "smallest_share": 0.9}},
}


def vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(VIT | changes)).eval()


def with_zeros(model):
    """The same model, with biases that are zero."""
    twin = vit()
    twin.load_state_dict(model.state_dict(), strict=False)
    for block in twin.blocks:
        for linear in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            torch.nn.init.zeros_(linear.bias)
    return twin


def extracted(model, name):
    given = dict(RULES[name])
    given["calibration"] = {"images": 40, "tokens": 400}
    spec = RunSpec(data=DATA, extract=rules(**given), init=RunSpec(data=DATA))
    model = copy.deepcopy(model)
    reports = extract(model, spec, load_splits(DATA).train, 10)
    return model, reports, spec.extract


@pytest.mark.parametrize("name", RULES)
def test_a_missing_bias_is_one_of_zeros(name):
    bare = vit(proj_bias=False)
    assert bare.blocks[0].mlp.fc1.bias is None
    model, reports, given = extracted(bare, name)
    of_zeros, same_reports, _ = extracted(with_zeros(bare), name)
    assert reports == same_reports
    with torch.no_grad():
        torch.testing.assert_close(model(X), of_zeros(X))
        again = fit_extracted(copy.deepcopy(bare), model.state_dict(), given)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["copies", "ridge", "shared", "oracle", "static", "neurons"])
def test_a_model_of_another_type_stays_in_it(name, dtype):
    model = vit()
    images = load_splits(DATA).train
    images = type(
        "InType",
        (),
        {
            "labels": images.labels,
            "__len__": lambda self: len(self.labels),
            "batch": lambda self, index, spec: load_splits(DATA).train.batch(index, spec).to(dtype),
        },
    )()
    given = dict(RULES[name]) | {"calibration": {"images": 40, "tokens": 400}}
    spec = RunSpec(data=DATA, extract=rules(**given), init=RunSpec(data=DATA))
    model = model.to(dtype)
    extract(model, spec, images, 10)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(X.to(dtype)).isfinite().all()


def test_neurons_of_an_mlp_without_biases_are_scored_removed_and_masked():
    model = vit(proj_bias=False)
    scores = neuron_scores(model, [(X, torch.arange(4))])
    keep = {name: keep_indices(score, 0.5) for name, score in scores.items()}
    narrow = remove(copy.deepcopy(model), keep)
    assert narrow.blocks[0].mlp.fc1.weight.shape == (32, 16)
    assert torch.equal(
        narrow.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight[keep["blocks.1.mlp"]]
    )
    fit = fit_shapes(copy.deepcopy(model), narrow.state_dict())
    fit.load_state_dict(narrow.state_dict())
    assert torch.equal(fit(X), narrow(X))
    assert mask_weights(copy.deepcopy(model), [(X, torch.arange(4))], 0.5)


class Named(Mlp):
    """A subclass that computes what timm's MLP does."""


class Other(Mlp):
    """A subclass that does not."""

    def forward(self, x):
        return super().forward(x) + x


def with_mlps(kind):
    model = vit()
    for block in model.blocks:
        block.mlp.__class__ = kind
    return model


def test_a_subclass_counts_by_what_it_computes():
    upcycle(with_mlps(Named), MoESpec(layers=1, experts=2))
    extracted(with_mlps(Named), "copies")
    assert "blocks.0.mlp" in neuron_scores(with_mlps(Named), [(X, torch.arange(4))])
    with pytest.warns(UserWarning, match=r"whole copies.*\(Other\) is no MLP whose"):
        whole = upcycle(with_mlps(Other), layers=1, experts=2)
    torch.testing.assert_close(whole(X), with_mlps(Other)(X))
    for call in (
        lambda: extracted(with_mlps(Other), "copies"),
        lambda: neuron_scores(with_mlps(Other), [(X, torch.arange(4))]),
    ):
        with pytest.raises(ValueError, match=r"\(Other\) is no MLP whose .*timm.layers.Mlp"):
            call()


def test_dropout_of_zero_is_none_and_any_other_is_refused_where_experts_are_made():
    extracted(vit(proj_drop_rate=0.0), "copies")
    with pytest.raises(ValueError, match="dropout inside the MLP .*experts do not carry"):
        extracted(vit(proj_drop_rate=0.1), "copies")
    assert neuron_scores(vit(proj_drop_rate=0.1), [(X, torch.arange(4))])
