"""A ViT of two blocks and 40 random images in loaders, for the tests of the public functions."""

from __future__ import annotations

import timm
import torch
from torch import nn

CLASSES, IMAGES, D, H = 5, 40, 24, 96
NAMES = ["blocks.0.mlp", "blocks.1.mlp"]


def vit(**changes):
    """A ViT whose four patches and class token are all recorded, with weights that tell apart."""
    torch.manual_seed(0)
    sizes = {"img_size": 14, "patch_size": 7, "embed_dim": D, "depth": 2, "num_heads": 2}
    model = timm.create_model(
        "vit_tiny_patch16_224", **{**sizes, "num_classes": CLASSES, "class_token": True, **changes}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def images_and_labels():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 14, 14, generator=generator)
    return images, torch.arange(IMAGES) % CLASSES


def loader(dtype=torch.float32, batch=8):
    """Batches in a list: each class is in each of them."""
    images, labels = images_and_labels()
    return list(zip(images.to(dtype).split(batch), labels.split(batch), strict=True))


class Wrapped(nn.Module):
    """A module of one's own around a trunk of timm."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.top = trunk, nn.Linear(trunk.num_classes, CLASSES)

    def forward(self, x):
        return self.top(self.trunk(x))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, state):
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)
