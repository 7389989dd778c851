"""DINOv2, DeiT, Swin and ConvNeXt under their publishers' names: the same logits, or a named fault.

Each test renames the state of a timm model to what the publisher's file has, by rules of its own.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from small_models import SMALL
from torch import nn

from lib.inputs import half_copied, weights
from lib.models.backbone import load_weights
from lib.models.published import state_for
from lib.spec import BackboneSpec

VIT = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
SIDE = {"swin_tiny_patch4_window7_224": 56, "convnext_tiny": 64, "convnextv2_atto": 64}


def dinov2(state):
    """facebookresearch/dinov2: a mask token, and the class token has a position of its own."""
    state = dict(state)
    state["mask_token"] = torch.zeros(1, 24)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        position = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(3))
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return state


def gated_dinov2(state):
    turned = dinov2(state)
    return {
        name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): tensor
        for name, tensor in turned.items()
    }


def deit(state):
    return dict(state)


def deit3(state):
    """DeiT III calls the scale of a branch gamma_1 and gamma_2."""
    return {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): t for name, t in state.items()}


def swin(state):
    """microsoft/Swin-Transformer: a stage ends in its downsampling, and buffers are saved."""
    turned = {}
    for name, tensor in state.items():
        name = re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        )
        turned[name.replace("head.fc.", "head.")] = tensor
    turned["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    turned["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    return turned


def convnext(state):
    """facebookresearch/ConvNeXt: the stem is a downsampling like the others."""
    turned = {}
    for name, tensor in state.items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        if "mlp.grn" in name:
            name = name.replace("mlp.grn.bias", "grn.beta").replace("mlp.grn.weight", "grn.gamma")
            tensor = tensor.view(1, 1, 1, -1)
        name = name.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        turned[name] = tensor
    return turned


PUBLISHED = {
    "vit_small_patch14_dinov2": (VIT, dinov2),
    "vit_small_patch14_reg4_dinov2": (VIT, dinov2),
    "vit_giant_patch14_dinov2": (VIT, gated_dinov2),
    "vit_giant_patch14_reg4_dinov2": (VIT, gated_dinov2),
    "deit_small_patch16_224": (VIT, deit),
    "deit_small_distilled_patch16_224": (VIT, deit),
    "deit3_small_patch16_224": (VIT, deit3),
    "swin_tiny_patch4_window7_224": (
        SMALL["swin_tiny_patch4_window7_224"] | {"depths": (2, 1)},
        swin,
    ),
    "convnext_tiny": (SMALL["convnext_tiny"], convnext),
    "convnextv2_atto": (SMALL["convnextv2_atto"], convnext),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path))
    return tmp_path


def model_of(name, seed, classes=5):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes, **PUBLISHED[name][0]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@cache
def images_of(name):
    side = SIDE.get(name, 28)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(9))


def saved(folder, state):
    torch.save({"model": state}, folder / "their.pth")
    return f"pth:their.pth@{hashlib.sha256((folder / 'their.pth').read_bytes()).hexdigest()}"


def loaded(folder, name, state, classes=5):
    model = model_of(name, seed=1, classes=classes)
    spec = BackboneSpec(name=name, weights=saved(folder, state))
    load_weights(model, state_for(model, spec), spec.weights, (4, 4))
    return model


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_logits_are_those_of_the_model_that_was_published(folder, name):
    classes = 0 if "dinov2" in name else 5  # DINOv2's files have no head: the features are compared
    published, fresh = model_of(name, 0, classes), model_of(name, 1, classes)
    ours = loaded(folder, name, PUBLISHED[name][1](published.state_dict()), classes)
    with torch.no_grad():
        wanted, found = published(images_of(name)), ours(images_of(name))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fresh(images_of(name)), wanted, rtol=0.1)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_head_of_other_classes_stays_out(folder, name):
    published = model_of(name, seed=0)
    ours = loaded(folder, name, PUBLISHED[name][1](published.state_dict()), classes=3)
    features = ours.forward_features(images_of(name))
    torch.testing.assert_close(
        features, published.forward_features(images_of(name)), rtol=1e-4, atol=1e-5
    )


def test_a_checkpoint_of_timm_s_own_names_is_left_as_it_is(folder):
    for name in PUBLISHED:
        published = model_of(name, seed=0)
        found = loaded(folder, name, published.state_dict()).state_dict()
        for key, tensor in published.state_dict().items():
            assert torch.equal(found[key], tensor), (name, key)


BLOCK = "blocks.1.attn.qkv.weight"
FAULTS = {
    "vit_small_patch14_dinov2": (BLOCK, BLOCK),
    "vit_giant_patch14_reg4_dinov2": ("blocks.1.mlp.w3.bias", "blocks.1.mlp.fc2.bias"),
    "deit_small_distilled_patch16_224": ("dist_token", "dist_token"),
    "deit3_small_patch16_224": ("blocks.0.gamma_2", "blocks.0.ls2.gamma"),
    "swin_tiny_patch4_window7_224": (
        "layers.0.downsample.reduction.weight",
        "layers.1.downsample.reduction.weight",
    ),
    "convnext_tiny": ("stages.1.0.pwconv1.weight", "stages.1.blocks.0.mlp.fc1.weight"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_wrong_a_missing_and_a_surplus_tensor_are_named(folder, name):
    their_name, our_name = FAULTS[name]
    published = model_of(name, seed=0)
    state = PUBLISHED[name][1](published.state_dict())
    expected = re.escape(str(tuple(published.state_dict()[our_name].shape)))
    wrong = state | {their_name: torch.zeros(3, 2)}
    says = rf"({re.escape(our_name)}|{re.escape(their_name)}) is \(3, 2\), expected {expected}"
    with pytest.raises(ValueError, match=says):
        loaded(folder, name, wrong)
    missing = {key: tensor for key, tensor in state.items() if key != their_name}
    if not name.startswith("swin"):  # without it the layout is read as timm's: the next test
        says = f"expected {re.escape(our_name)} {expected}, and it is absent"
        with pytest.raises(ValueError, match=says):
            loaded(folder, name, missing)
    with pytest.raises(ValueError, match=r"surplus.weight is \(3, 2\), expected no such tensor"):
        loaded(folder, name, state | {"surplus.weight": torch.zeros(3, 2)})


def test_a_missing_tensor_of_swin_is_named(folder):
    name = "swin_tiny_patch4_window7_224"
    state = swin(model_of(name, seed=0).state_dict())
    del state["layers.1.blocks.0.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"expected layers.1.blocks.0.mlp.fc1.bias \(128,\)"):
        loaded(folder, name, state)
    del state["layers.0.downsample.reduction.weight"]
    with pytest.raises(ValueError, match="layers.1.downsample.reduction.weight"):
        loaded(folder, name, state)


# ---- half a copy, by format


def test_half_a_copy_is_told_from_a_whole_file(tmp_path):
    state = {"a": torch.arange(4000.0), "b": torch.ones(3)}
    files = [tmp_path / name for name in ("a.pth", "a.safetensors", "a.npz")]
    torch.save(state, files[0])
    save_file(state, files[1])
    np.savez(files[2], a=np.arange(4000.0))
    reasons = ["its table of contents, which", "it has 8,0.. of 16,...? bytes", "its table of con"]
    for file, reason in zip(files, reasons, strict=True):
        assert half_copied.why_half_copied(file) is None
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert re.match(reason, half_copied.why_half_copied(file)), file
        file.write_bytes(b"")
        assert half_copied.why_half_copied(file) == "it is empty"
    files[1].write_bytes(whole[:20])  # its first bytes are read as the length of a header
    assert half_copied.why_half_copied(files[0].with_suffix(".safetensors"))


def test_the_errors_of_readers_say_so(folder):
    save_file({"a": torch.arange(4000.0)}, folder / "a.safetensors")
    whole = (folder / "a.safetensors").read_bytes()
    sha = hashlib.sha256(whole).hexdigest()
    (folder / "a.safetensors").write_bytes(whole[:1000])
    for name in ("file:a.safetensors", f"file:a.safetensors@{sha}"):
        with pytest.raises(ValueError, match=r"half copied: it has 1,000 of 16,\d+ bytes. Copy or"):
            weights.fetch(name, "")
