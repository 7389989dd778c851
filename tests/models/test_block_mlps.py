"""Which MLPs of a model are its blocks' own: found by their place, whatever holds them."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

from lib.extraction.record import mlps_of
from lib.models.upcycle import block_mlps, upcycle
from lib.pruning.neurons.groups import prunable
from lib.spec import MoESpec


@pytest.mark.parametrize(
    "name, mlps",
    [
        ("vit_tiny_patch16_224", {"blocks.#.mlp": 12}),
        ("deit3_small_patch16_224", {"blocks.#.mlp": 12}),
        ("deit_tiny_distilled_patch16_224", {"blocks.#.mlp": 12}),
        ("beit_base_patch16_224", {"blocks.#.mlp": 12}),
        ("beitv2_base_patch16_224", {"blocks.#.mlp": 12}),
        ("eva02_tiny_patch14_224", {"blocks.#.mlp": 12}),
        ("vit_small_patch14_reg4_dinov2", {"blocks.#.mlp": 12}),
        ("swin_tiny_patch4_window7_224", {"layers.#.blocks.#.mlp": 12}),
        ("swinv2_tiny_window8_256", {"layers.#.blocks.#.mlp": 12}),  # attn.cpb_mlp beside
        ("convnext_atto", {"stages.#.blocks.#.mlp": 12}),
        ("cait_xxs24_224", {"blocks.#.mlp": 24, "blocks_token_only.#.mlp": 2}),
        ("xcit_nano_12_p16_224", {"blocks.#.mlp": 12, "cls_attn_blocks.#.mlp": 2}),
        ("convit_tiny", {"blocks.#.mlp": 12}),
        ("mobilevit_xxs", {"stages.#.#.transformer.#.mlp": 9}),
        ("volo_d1_224", {"network.#.#.mlp": 18, "post_network.#.mlp": 2}),
        # the MLP of a position bias, called attn.rel_pos.mlp
        ("vit_relpos_small_patch16_224", {"blocks.#.mlp": 12}),
        ("vit_srelpos_small_patch16_224", {"blocks.#.mlp": 12}),  # one for all blocks
        # a block is itself called an attention
        (
            "maxvit_rmlp_pico_rw_256",
            {"stages.#.blocks.#.attn_block.mlp": 11, "stages.#.blocks.#.attn_grid.mlp": 11},
        ),
        ("maxvit_tiny_pm_256", {"stages.#.blocks.#.attn.mlp": 11}),
        # the MLP of a pooling head, called attn_pool.mlp
        ("vit_base_patch16_siglip_224", {"blocks.#.mlp": 12}),
        ("vit_pe_core_tiny_patch16_384", {"blocks.#.mlp": 12}),
        # the MLP of a gate, called attn.attn.mlp
        ("csatv2", {"stages.#.#.mlp": 4}),
        ("resnet18", {}),
    ],
)
def test_blocks_of_timm(name, mlps):
    with torch.device("meta"):
        model = timm.create_model(name)
    names = [re.sub(r"\d+", "#", mlp) for mlp, _ in block_mlps(model)]
    assert {mlp: names.count(mlp) for mlp in names} == mlps


class Bias(nn.Module):
    """Makes the position bias of an attention, with an MLP of its own."""

    def __init__(self):
        super().__init__()
        self.mlp = Mlp(2, 8, 4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.rel_pos, self.proj = Bias(), nn.Linear(16, 16)


class Block(nn.Module):
    def __init__(self, attn: bool = True, norm: bool = True):
        super().__init__()
        if norm:
            self.norm = nn.LayerNorm(16)
        if attn:
            self.attn = Attention()
        self.mlp = Mlp(16, 32)


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.latent, self.mlp = nn.Parameter(torch.zeros(16)), Mlp(16, 32)


def model_of(**parts: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def blocks(**options) -> nn.Sequential:
    return nn.Sequential(Block(**options), Block(**options))


def sequence(**parts: nn.Module) -> nn.Sequential:
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: model_of(layers=blocks()), ["layers.0.mlp", "layers.1.mlp"]),
        (
            lambda: model_of(layers=nn.ModuleList([Block(attn=False, norm=False)])),
            ["layers.0.mlp"],
        ),
        (lambda: model_of(layers=nn.ModuleDict({"a": Block()})), ["layers.a.mlp"]),
        (lambda: blocks(attn=False), ["0.mlp", "1.mlp"]),
        # names say nothing
        (
            lambda: model_of(attn_pool=blocks(), head=nn.ModuleList([Block()])),
            ["attn_pool.0.mlp", "attn_pool.1.mlp", "head.0.mlp"],
        ),
        (lambda: model_of(first=Block(), second=Block()), ["first.mlp", "second.mlp"]),
        # heads: beside the blocks, a list of parts, deeper, and of the model itself
        (lambda: model_of(layers=blocks(), pool=Pool()), ["layers.0.mlp", "layers.1.mlp"]),
        (
            lambda: model_of(layers=blocks(), end=sequence(norm=nn.LayerNorm(16), mlp=Mlp(16))),
            ["layers.0.mlp", "layers.1.mlp"],
        ),
        (
            lambda: model_of(vit=model_of(layers=blocks(), pool=Pool()), mlp=Mlp(16)),
            ["vit.layers.0.mlp", "vit.layers.1.mlp"],
        ),
        # a block that is a list of its parts
        (
            lambda: model_of(
                layers=nn.Sequential(
                    sequence(attn=Attention(), mlp=Mlp(16)), sequence(attn=Attention(), mlp=Mlp(16))
                )
            ),
            ["layers.0.mlp", "layers.1.mlp"],
        ),
    ],
)
def test_blocks_of_other_models(make, names):
    model = make()
    assert [name for name, _ in block_mlps(model)] == names
    # all that looks for blocks finds the same ones
    assert list(mlps_of(model)) == list(prunable(model, ("mlp",))) == names
    upcycle(model, MoESpec(layers=1, experts=2, router="token"))
    assert [name for name, _ in block_mlps(model)] == names
