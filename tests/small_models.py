"""Small versions of timm's models, one a kind of MLP, and a module of one's own around a trunk."""

from __future__ import annotations

import copy
import functools

import timm
import torch
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.metaformer import (
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    SepConv,
)
from timm.models.mlp_mixer import MlpMixer
from torch import nn


def caformer(dims, depths, num_classes):
    """As timm builds `caformer_s18`, of other sizes."""
    return MetaFormer(
        num_classes=num_classes,
        dims=dims,
        depths=depths,
        token_mixers=[SepConv, SepConv, MetaFormerAttention, MetaFormerAttention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
    )


VIT = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
# {name: arguments that make it small}; an input side of 64 where they name none
SMALL = {
    "vit_small_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "vit_small_patch16_dinov3": VIT,
    "vit_small_plus_patch16_dinov3": VIT,
    "eva02_tiny_patch14_224": VIT,
    "eva02_base_patch14_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN | {"img_size": 56},
    "swinv2_tiny_window8_256": SWIN | {"img_size": 64},
    "convnext_tiny": CONVNEXT,
    "convnext_atto": CONVNEXT,
    "convnextv2_atto": CONVNEXT,
    "vit_base_patch16_siglip_224": VIT,
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "maxvit_nano_rw_256": {"img_size": 64, "embed_dim": (32,) * 4, "depths": (1,) * 4},
    "caformer_s18": {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)},
    "mixer_s32_224": {"img_size": 64, "patch_size": 16, "embed_dim": 32, "num_blocks": 2},
    "cait_xxs24_224": VIT | {"depth_token_only": 1},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 1},
    "efficientformerv2_s0": {"img_size": 64},
}
OWN = "own module"
# built by their class: what builds them by name takes no sizes
BY_CLASS = {"caformer_s18": caformer, "mixer_s32_224": MlpMixer}
CLASSES = 5
CHANNELS = ["blocks.*.mlp_channels"]


class Owner(nn.Module):
    """A user's own module around a trunk of timm."""

    def __init__(self):
        super().__init__()
        self.trunk = timm.create_model("vit_small_patch16_224", num_classes=0, **VIT)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x):
        return self.head(self.trunk(x).relu())


def small(name):
    """A small model with weights large enough to tell apart, in evaluation mode."""
    return copy.deepcopy(built(name))


@functools.cache
def built(name):
    torch.manual_seed(0)
    if name == OWN:
        model = Owner()
    else:
        build = BY_CLASS.get(name, functools.partial(timm.create_model, name))
        model = build(num_classes=CLASSES, **SMALL[name])
    for stage in getattr(model, "stages", []):
        if hasattr(stage, "blocks"):
            stage.blocks = stage.blocks[:1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def images_for(name, count=4):
    side = SMALL.get(name, VIT).get("img_size", 64)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, generator=generator)


def modules_of(name):
    return CHANNELS if name.startswith("mixer") else None


def assert_same(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, scale))
