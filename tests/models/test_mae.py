"""Masked-autoencoder pretraining: what is hidden, what the encoder sees, what the loss counts."""

from __future__ import annotations

import pytest
import timm
import torch

from lib.models.mae import MaskedAutoencoder
from lib.models.moe import RoutingTape
from lib.models.upcycle import upcycle
from lib.spec import MaskSpec, MoESpec

MASK = MaskSpec(ratio=0.75, width=16, depth=1, heads=2)


def vit(**more):
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=12,
        patch_size=3,
        embed_dim=8,
        depth=2,
        num_heads=2,
        num_classes=3,
        **more,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaskedAutoencoder(vit(), MASK).eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_share_of_hidden_patches_and_shapes(model, images):
    out = model(images, draw())
    assert out.hidden.sum(dim=1).tolist() == [12, 12]  # 75% of 16
    assert out.prediction.shape == (2, 16, 27)
    assert torch.equal(out.hidden, model(images, draw()).hidden)
    assert not torch.equal(out.hidden, model(images, draw(1)).hidden)


def test_patches_and_picture_are_inverse(model, images):
    rows = model.patches(images)
    # Row 5 of a 4 x 4 grid is the patch at row 1, column 1; unfold lists channel by channel.
    assert torch.equal(rows[0, 5].view(3, 3, 3), images[0, :, 3:6, 3:6])
    out = model(images, draw())
    mean, scale = rows.mean(-1, keepdim=True), (rows.var(-1, keepdim=True) + 1e-6).sqrt()
    perfect = type(out)(out.loss, (rows - mean) / scale, out.hidden)
    torch.testing.assert_close(model.picture(images, perfect), images)


def test_loss_counts_hidden_patches_only(model, images):
    out = model(images, draw())
    rows = model.patches(images)
    wanted = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = [
        (out.prediction[i, p] - wanted[i, p]).square().mean() for i, p in out.hidden.nonzero()
    ]
    assert len(errors) == 24  # 12 hidden patches of two images
    assert out.loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_hidden_pixels_do_not_reach_the_encoder(model, images):
    out = model(images, draw())
    changed = images.clone()
    rows = out.hidden[0].nonzero()[:, 0]
    for p in rows.tolist():
        top, left = 3 * (p // 4), 3 * (p % 4)
        changed[0, :, top : top + 3, left : left + 3] = 0.5
    torch.testing.assert_close(model(changed, draw()).prediction, out.prediction)


def test_without_a_mask_the_encoder_is_timms(model, images):
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(model.encode(images, every), model.encoder.forward_features(images))
    registers = MaskedAutoencoder(vit(reg_tokens=2, no_embed_class=True), MASK).eval()
    torch.testing.assert_close(
        registers.encode(images, every), registers.encoder.forward_features(images)
    )


def test_moe_layers_route_visible_tokens_and_learn(images):
    torch.manual_seed(0)
    model = MaskedAutoencoder(upcycle(vit(), MoESpec(layers=1, experts=2, router="token")), MASK)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with RoutingTape(model) as tape:
        first = model(images, draw())
    # Class token and 4 visible patches.
    assert [routing.shape for routing in tape.routings()] == [(2, 5)]
    for _ in range(30):
        optimiser.zero_grad()
        loss = model(images, draw()).loss
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.7 * first.loss.item()
    assert all(p.grad is not None for name, p in model.named_parameters() if "head" not in name)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="Swin.* cannot be pretrained with masks"):
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=28, window_size=7, depths=(1, 1, 1, 1)
        )
        MaskedAutoencoder(swin, MASK)
    for registers in (0, 2):  # prefix tokens that are no class token
        options = {"class_token": False, "reg_tokens": registers, "global_pool": "avg"}
        with pytest.raises(ValueError, match="with class token and absolute"):
            MaskedAutoencoder(timm.create_model("vit_tiny_patch16_224", **options), MASK)
    with pytest.raises(ValueError, match="decoder width=18 must be a multiple"):
        MaskSpec(width=18, heads=2)
