"""`lib.upcycle`: a copy of the model with MoE layers, equal to it until it is trained."""

import pytest
import torch
from small_classifier import images_and_labels, vit

import lib
from lib.models.moe import MoELayer


def output(model):
    with torch.no_grad():
        return model(images_and_labels()[0])


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_is_changed_where_that_is_asked_for(inplace):
    model = vit()
    wanted = output(model)
    mixture = lib.upcycle(model, layers=1, experts=3, router="token", inplace=inplace)
    assert (mixture is model) == inplace
    assert isinstance(model.blocks[1].mlp, MoELayer) == inplace
    torch.testing.assert_close(output(mixture), wanted, atol=1e-5, rtol=0)


def test_what_was_done_is_told_by_layer():
    once = lib.upcycle(vit(), ignore=["blocks.0"], layers=1, experts=3, router="token")
    rows = [{"layer": "blocks.1.mlp", "experts": 3, "shared": False}]
    assert once.upcycling == rows
    twice = lib.upcycle(once, ignore=["blocks.1"], layers=1, experts=2, router="token", shared=True)
    assert twice.upcycling == rows + [{"layer": "blocks.0.mlp", "experts": 2, "shared": True}]
    assert once.upcycling == rows and not isinstance(once.blocks[0].mlp, MoELayer)


def test_what_fits_no_model_changes_none():
    model = vit()
    with pytest.raises(ValueError, match="beyond the depth"):
        lib.upcycle(model, layers=3, experts=2, router="token", inplace=True)
    assert not hasattr(model, "upcycling")
