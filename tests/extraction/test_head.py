"""The head fitted anew: by hand, against least squares, behind changed layers, refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from small_mlps import STATIC, rules
from torch import nn

from lib.extraction.extract import check, extract_layers
from lib.extraction.head import features_and_logits, fit_head

CLOSE = {"rtol": 0, "atol": 1e-5}


class Classifier(nn.Module):
    """Reads D numbers of an "image" through a linear head."""

    def __init__(self, width, classes):
        super().__init__()
        self.head = nn.Linear(width, classes)

    def get_classifier(self):
        return self.head

    def forward(self, images):
        return self.head(images)


def vit(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes | {"num_classes": 5} | changes)


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, 16, 16, generator=generator).split(16))


def test_one_feature_by_hand():
    model = Classifier(1, 1)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    # features 0 and 2: mean 1, variance 1; lacking 0 and 2: mean 1, covariance 1
    fit_head(model, [torch.tensor([[0.0]]), torch.tensor([[2.0]])], torch.tensor([[0.0], [2.0]]), 1)
    # slope 1 / (1 + penalty 1); the means are met
    assert model.head.weight.item() == pytest.approx(0.5)
    assert model.head.bias.item() == pytest.approx(0.5)


def test_it_is_penalised_least_squares_on_what_the_logits_lack():
    generator = torch.Generator().manual_seed(3)
    x, dense = (torch.randn(40, n, generator=generator).double() for n in (6, 4))
    model, penalty = Classifier(6, 4), 0.3
    before = copy.deepcopy(model.head).double()
    lacking = dense - before(x)
    fit_head(model, list(x.float().split(7)), dense.float(), penalty)
    centred = x - x.mean(0)
    ridge = (penalty * len(x) * centred.var(0, unbiased=False).mean()).sqrt()
    rows = torch.cat([centred, ridge * torch.eye(6)])
    goal = torch.cat([lacking - lacking.mean(0), torch.zeros(6, 4)])
    change = torch.linalg.lstsq(rows, goal).solution.t()
    bias = before.bias + lacking.mean(0) - change @ x.mean(0)
    torch.testing.assert_close(model.head.weight.double(), before.weight + change, **CLOSE)
    torch.testing.assert_close(model.head.bias.double(), bias, **CLOSE)


@pytest.mark.parametrize("sequential", [True, False])
def test_behind_narrower_layers_it_brings_the_logits_nearer_to_the_dense_model(sequential):
    dense, batches = vit(), images(64)
    of_run = {"clusters": STATIC, "neurons": {"active": 0.3}, "calibration": {"images": 64}}
    fixed, fitted = (
        rules(**of_run, correction={"method": "ridge", "sequential": sequential, "head": head})
        for head in (None, 1e-3)
    )
    distance, heads = [], []
    for one in (fixed, fitted):
        model = copy.deepcopy(dense).train()
        extract_layers(model, iter(batches), one, seed=0)
        assert model.training and model.blocks[0].mlp.fc1.out_features < 96
        _, logits = features_and_logits(model, batches)
        distance.append((logits - features_and_logits(dense, batches)[1]).square().mean().item())
        heads.append(model.head.weight)
    assert torch.equal(heads[0], dense.head.weight)
    assert distance[1] < 0.5 * distance[0]


def test_a_model_that_lost_nothing_keeps_its_head():
    dense, batches = vit(), images(32)
    model = copy.deepcopy(dense)
    _, logits = features_and_logits(dense, batches)
    fit_head(model, batches, logits, 0.1)
    torch.testing.assert_close(model.head.weight, dense.head.weight)
    torch.testing.assert_close(model.head.bias, dense.head.bias)


def test_models_without_a_linear_head_are_refused_before_any_work():
    spec = rules(clusters=STATIC, correction={"method": "ridge", "head": 0.1})
    with pytest.raises(ValueError, match="correction.head fits a linear classifier with a bias"):
        check(vit(num_classes=0), spec)
