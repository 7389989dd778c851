"""SatMAE's files: the encoder alone, the group with the colours, and every fault by its name."""

from __future__ import annotations

import argparse
import hashlib
import re
from functools import partial

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block

from lib.inputs import satmae, weights
from lib.inputs.splits import scale_of
from lib.models.backbone import build, create
from lib.spec import BackboneSpec, DataSpec, RunSpec

D, OF_GROUP, PATCH, GRID = 32, 8, 7, 4
SPEC = BackboneSpec(patch=PATCH, width=D, depth=2, heads=2)
GROUPS = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))  # of the ten bands that are left of Sentinel-2
BLUE, GREEN, RED, INFRARED = 0, 1, 2, 6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path))
    return tmp_path


def saved(folder, state, name="pretrain.pth"):
    """As the authors' misc.save_model writes it."""
    content = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 199,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="mae_vit_large_patch16", grouped_bands=[[0, 1, 2, 6]]),
    }
    torch.save(content, folder / name)
    return f"satmae:{name}@{hashlib.sha256((folder / name).read_bytes()).hexdigest()}"


def drawn(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def blocks(prefix, count, width):
    """Blocks as timm 0.3.2 named their weights, which it does still."""
    torch.manual_seed(1)
    return {
        f"{prefix}.{i}.{name}": tensor.clone()
        for i in range(count)
        for name, tensor in Block(width, 2, qkv_bias=True).state_dict().items()
    }


def decoder():
    names = {"mask_token": (1, 1, 16), "decoder_embed.weight": (16, D), "decoder_norm.bias": (16,)}
    names |= {"decoder_pos_embed": (1, 17, 8), "decoder_pred.weight": (3 * PATCH**2, 16)}
    return drawn(**names) | blocks("decoder_blocks", 1, 16)


def plain():
    outer = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + GRID**2, D), "norm.weight": (D,)}
    outer |= {"norm.bias": (D,), "patch_embed.proj.weight": (D, 3, PATCH, PATCH)}
    return drawn(**outer, **{"patch_embed.proj.bias": (D,)}) | blocks("blocks", 2, D)


def of_groups():
    outer = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + GRID**2, D - OF_GROUP)}
    outer |= {"channel_embed": (1, 3, OF_GROUP), "norm.weight": (D,), "norm.bias": (D,)}
    for group, bands in enumerate(GROUPS):
        outer[f"patch_embed.{group}.proj.weight"] = (D, len(bands), PATCH, PATCH)
        outer[f"patch_embed.{group}.proj.bias"] = (D,)
    state = drawn(**outer) | blocks("blocks", 2, D)
    state["pos_embed"][:, 0] = 0  # sine and cosine, with zeros for the class token
    return state


def of_groups_with_decoder():
    pred = {"decoder_pred.0.weight": (4 * PATCH**2, 16), "decoder_channel_embed": (1, 4, 8)}
    return of_groups() | decoder() | drawn(**pred)


def theirs(state, bands):
    """The class token after the encoder of groups, where tokens of the first group alone are seen.

    bands: (B, 10, h, w) in 0..1. A copy of the steps of its forward_encoder.
    """
    kernel, bias = state["patch_embed.0.proj.weight"], state["patch_embed.0.proj.bias"]
    x = torch.nn.functional.conv2d(bands[:, GROUPS[0]], kernel, bias, stride=PATCH)
    x = x.flatten(2).transpose(1, 2)  # (B, N, D)
    of_group = state["channel_embed"][:, :1].expand(-1, x.shape[1], -1)
    x = x + torch.cat([state["pos_embed"][:, 1:], of_group], dim=-1)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1)
    for i in range(2):
        block = Block(D, 2, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
        prefix = f"blocks.{i}."
        names = [name for name in state if name.startswith(prefix)]
        block.load_state_dict({name.removeprefix(prefix): state[name] for name in names})
        x = block.eval()(x)
    return torch.nn.functional.layer_norm(x, (D,), state["norm.weight"], state["norm.bias"], 1e-6)


def run_of(name):
    return RunSpec(data=DataSpec(image_size=28), backbone=SPEC.but(weights=name))


def test_the_plain_encoder_is_taken_and_nothing_else(folder):
    encoder = plain()
    name = saved(folder, encoder | decoder() | drawn(**{"head.weight": (62, D)}))
    found = weights.fetch(name, "")
    assert set(found) == set(encoder)
    assert all(torch.equal(found[key], tensor) for key, tensor in encoder.items())
    model = build(run_of(name), 5, 3)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, encoder["blocks.1.mlp.fc2.weight"])
    assert model.head.weight.shape == (5, D)


def test_positions_are_resampled_like_those_of_others(folder):
    state = plain()
    name = saved(folder, state | decoder())
    large = build(run_of(name).but(data={"image_size": 56}), 5, 3)
    wanted = resample_abs_pos_embed(state["pos_embed"], new_size=[8, 8], old_size=[4, 4])
    assert torch.equal(large.pos_embed, wanted)


def test_the_first_group_computes_what_it_did_on_colour_images(folder):
    state = of_groups()
    name = saved(folder, of_groups_with_decoder())
    model = build(run_of(name), 5, 3).eval()
    colours = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    bands = torch.full((2, 10, 28, 28), 0.5)
    for band, channel in ((RED, 0), (GREEN, 1), (BLUE, 2)):
        bands[:, band] = colours[:, channel]
    mean, std = scale_of(3, BackboneSpec(weights=name))
    with torch.no_grad():
        ours = model.forward_features((colours - mean) / std)
    torch.testing.assert_close(ours, theirs(state, bands), rtol=1e-4, atol=1e-4)
    bands[:, INFRARED] = 0.9  # the test can tell
    assert (ours - theirs(state, bands)).abs().max() > 1e-2


def test_a_finetuned_file_of_groups_brings_a_part_for_its_class_token(folder):
    extra = drawn(**{"channel_cls_embed": (1, 1, OF_GROUP), "head.weight": (62, D)})
    found = weights.fetch(saved(folder, of_groups() | extra), "")
    assert torch.equal(found["pos_embed"][:, :1, D - OF_GROUP :], extra["channel_cls_embed"])
    assert "head.weight" not in found and "channel_cls_embed" not in found


def test_pixels_are_normalised_as_the_authors_did():
    mean, std = scale_of(3, BackboneSpec(weights="satmae:a@0"))
    assert mean.flatten().tolist() == pytest.approx(satmae.MEAN)
    assert std.flatten().tolist() == pytest.approx(satmae.STD)


@pytest.mark.parametrize(
    "name, shape, says",
    [
        (
            "patch_embed.1.proj.weight",
            (D, 3, 7, 7),
            "proj.weight is (32, 3, 7, 7), expected (32, 4",
        ),
        ("patch_embed.2.proj.bias", (D + 1,), "patch_embed.2.proj.bias is (33,), expected (32,)"),
        ("channel_embed", (1, 4, OF_GROUP), "channel_embed is (1, 4, 8), expected (1, 3, 8)"),
        ("patch_embed.0.proj.weight", None, "patch_embed.0.proj.weight is absent, expected (32, 4"),
        ("patch_embed.1.proj.bias", None, "patch_embed.1.proj.bias is absent, expected (32,)"),
        (
            "patch_embed.3.proj.weight",
            (D, 1, 7, 7),
            "has patch_embed.3.proj.weight, and a model of",
        ),
        ("cls_token", None, "lacks cls_token"),
        ("pos_embed", None, "lacks pos_embed"),
        ("fc_norm.weight", (D,), "has fc_norm.weight and so was finetuned on the mean"),
    ],
)
def test_wrong_missing_and_surplus_tensors_of_groups_are_named(folder, name, shape, says):
    state = of_groups()
    if shape is None:
        del state[name]
    else:
        state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=re.escape(says)):
        weights.fetch(saved(folder, state), "")


@pytest.mark.parametrize("kind", [plain, of_groups])
@pytest.mark.parametrize(
    "name, shape, says",
    [
        ("blocks.1.attn.qkv.weight", (96, 31), "qkv.weight is (96, 31), expected (96, 32)"),
        ("blocks.0.norm2.bias", None, "expected blocks.0.norm2.bias (32,), and it is absent"),
        ("blocks.0.extra", (3,), "blocks.0.extra is (3,), expected no such tensor"),
    ],
)
def test_wrong_missing_and_surplus_tensors_of_blocks_are_named(folder, kind, name, shape, says):
    state = kind()
    if shape is None:
        del state[name]
    else:
        state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=re.escape(says)):
        build(run_of(saved(folder, state)), 5, 3)


def test_a_model_of_series_of_images_is_refused(folder):
    state = plain() | drawn(pos_embed=(1, 17, D - 12))
    with pytest.raises(ValueError, match="with times in the rest of the width"):
        weights.fetch(saved(folder, state), "")


def test_a_file_of_groups_is_named_by_its_word(folder):
    name = saved(folder, of_groups())
    with pytest.raises(ValueError, match="groups of bands: name it satmae:pretrain.pth@"):
        weights.fetch(name.replace("satmae:", "pth:"), "")


def test_hash_is_asked_for_and_half_a_copy_is_named(folder):
    name = saved(folder, plain())
    with pytest.raises(ValueError, match="as satmae:pretrain.pth@SHA256, and none was given"):
        weights.fetch(name.partition("@")[0], "")
    file = folder / "pretrain.pth"
    file.write_bytes(file.read_bytes()[:5000])
    half = hashlib.sha256(file.read_bytes()).hexdigest()
    for sha in (name.partition("@")[2], half):
        with pytest.raises(
            ValueError, match="is half copied: its table of contents.*with that whe"
        ):
            weights.fetch(f"satmae:pretrain.pth@{sha}", "")


def test_plain_weights_are_those_of_a_timm_model():
    """The names that these tests write are the ones that a model has."""
    assert set(plain()) == {n for n in create(SPEC, 28, 0, 3).state_dict()}
