"""Models whose MLPs are gated, convolutional or copied whole, saved, restored and exported."""

from __future__ import annotations

import pytest
import timm
import torch

import lib
from lib.models.copies import WholeCopies
from lib.models.moe import MoELayer

GATED = ("vit_small_plus_patch16_dinov3", {"img_size": 32, "depth": 2})
SWIGLU = ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2})
NORMED = ("eva02_base_patch14_224", {"img_size": 28, "depth": 1, "embed_dim": 48, "num_heads": 2})
CONVOLUTIONS = ("convnext_atto", {"depths": (1, 1, 1, 1), "conv_mlp": True})
LINEAR = ("convnext_atto", {"depths": (1, 1, 1, 1), "conv_mlp": False})
RESPONSE_NORM = ("convnextv2_atto", {"depths": (1, 1, 1, 1)})

STEPS = {
    "upcycled": lambda model, data: lib.upcycle(model, layers=1, experts=2, router="token"),
    "shared": lambda model, data: lib.upcycle(
        model, layers=1, experts=3, router="token", top_k=2, shared=True
    ),
    "pruned": lambda model, data: lib.prune(model, data, images=16),
    "by Taylor": lambda model, data: lib.prune(model, data, score="taylor", images=16),
    "extracted": lambda model, data: lib.extract(model, data, count=2, images=16),
    "copies": lambda model, data: lib.extract(model, data, count=2, images=16, storage="copies"),
}
CASES = [(model, step) for model in (GATED, SWIGLU, CONVOLUTIONS, LINEAR) for step in STEPS]
CASES += [(model, step) for model in (NORMED, RESPONSE_NORM) for step in ("upcycled", "shared")]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0][0]}, {case[1]}")
def case(request):
    """A model after a step, images for it, and the arguments that timm got."""
    (name, arguments), step = request.param
    torch.manual_seed(0)
    size = arguments.get("img_size", 64)
    images = torch.randn(8, 3, size, size)
    data = [(images, torch.arange(8) % 4), (images.flip(0), torch.arange(8) % 4)]
    model = timm.create_model(name, num_classes=4, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # layer scales near zero would hide the blocks
            parameter.add_(0.05 * torch.randn_like(parameter))
    return STEPS[step](model, data).eval(), images[:3], {"num_classes": 4} | arguments


@pytest.mark.filterwarnings("ignore:.*whole copies")
@torch.no_grad()
def test_saved_and_restored_to_the_bit(case, tmp_path):
    model, images, arguments = case
    lib.save(model, tmp_path / "model.safetensors", arguments=arguments)
    restored = lib.restore(tmp_path / "model.safetensors")
    assert torch.equal(restored(images), model(images))


@pytest.mark.filterwarnings("ignore:.*whole copies")
@torch.no_grad()
def test_exported(case):
    model, images, _ = case
    torch.testing.assert_close(lib.for_export(model)(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*whole copies")
def test_the_cases_reach_every_kind():
    """Gated experts, whole copies on tokens and on images, and layers that see channels first."""
    kinds = set()
    for name, arguments in (GATED, NORMED, RESPONSE_NORM, CONVOLUTIONS):
        model = timm.create_model(name, num_classes=4, **arguments)
        with torch.no_grad():
            mixture = lib.upcycle(model, layers=1, experts=2, router="token")
        [layer] = [m for m in mixture.modules() if isinstance(m, MoELayer)]
        if isinstance(layer.experts, WholeCopies):
            kinds.add(f"copies on {'tokens' if layer.experts.token_wise else 'images'}")
        elif layer.experts.gated:
            kinds.add("gated")
        if layer.channels_first:
            kinds.add("channels first")
    assert kinds == {"gated", "copies on tokens", "copies on images", "channels first"}
