"""Gated and convolutional MLPs, and whole copies: saved, restored and exported."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch

import lib
from lib.pruning.neurons.groups import shapes_of, supported
from lib.pruning.neurons.removal import remove

# {name: arguments, side of an image}; what stands in a comment is what its MLPs are
SMALL = {
    "eva02_tiny_patch14_224": ({"img_size": 28, "depth": 1}, 28),  # gated, with a norm inside
    "vit_small_plus_patch16_dinov3": ({"img_size": 32, "depth": 1}, 32),  # gated
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, 32),  # convolutions
    "convnextv2_atto": ({"depths": (1, 1, 1, 1)}, 32),  # response norm
}


def built(name):
    torch.manual_seed(0)
    arguments, side = SMALL[name]
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    return model, torch.randn(2, 3, side, side)


def same_function(model, images, file):
    lib.save(model, file)
    restored, exported = lib.restore(file), lib.for_export(model)
    with torch.no_grad():
        out = model(images)
        assert torch.equal(out, restored(images))
        assert torch.allclose(out, exported(images), atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_upcycled(name, tmp_path):
    model, images = built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of whole copies
        lib.upcycle(model, layers=1, experts=2, router="token", shared=True)
    same_function(model, images, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", SMALL)
def test_narrowed(name, tmp_path):
    model, images = built(name)
    sets = shapes_of(supported(model))
    remove(model, {s: torch.arange(n[-1] // 2) for s, n in sets.items() if len(n) == 1})
    same_function(model, images, tmp_path / "model.safetensors")
