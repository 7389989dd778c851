"""Which models begin a layer's tokens with the class token, and which count images in the first
axis."""

from __future__ import annotations

import pytest
import timm
import torch

from lib.models.tokens import begins_with_class_token
from lib.models.upcycle import block_mlps, upcycle
from lib.spec import MoESpec

SIDE = 64  # pixels


def on_meta(name: str, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def class_positions(model, layers: list[str]) -> dict[str, bool]:
    """Asks each layer whether its token 0 is the class token: nothing but the class token changes
    where attention does not mix tokens."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name):
        def note(_, inputs):
            seen[name] = inputs[0].detach().clone()

        return model.get_submodule(name).register_forward_pre_hook(note)

    hooks = [watch(name) for name in layers]
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.eval()(image)
        before = dict(seen)
        model.cls_token.add_(1.0)
        model(image)
    for hook in hooks:
        hook.remove()
    return {name: not torch.equal(before[name][:, 0], seen[name][:, 0]) for name in layers}


@pytest.mark.parametrize(
    "name, layers",
    [
        ("cait_xxs24_224", {"blocks.23.mlp": False, "blocks_token_only.0.mlp": True}),
        ("xcit_nano_12_p16_224", {"blocks.11.mlp": False, "cls_attn_blocks.0.mlp": True}),
        ("convit_tiny", {"blocks.9.mlp": False, "blocks.10.mlp": True}),
        ("deit_tiny_distilled_patch16_224", {"blocks.0.mlp": True}),
        ("volo_d1_224", {"network.0.0.mlp": False}),
    ],
)
def test_where_the_class_token_joins(name, layers):
    model = timm.create_model(name, img_size=SIDE)
    assert {layer: begins_with_class_token(model, layer) for layer in layers} == layers
    # what the class token cannot reach does not begin with it
    reached = class_positions(model, list(layers))
    assert all(reached[layer] for layer, begins in layers.items() if begins)
    assert not any(reached[layer] for layer, begins in layers.items() if not begins)


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_medium_patch16_rope_reg1_gap_256", "Eva has none"),
        ("vit_betwixt_patch16_rope_reg4_gap_256", "Eva has none"),
        ("vit_medium_patch16_reg4_gap_256", "VisionTransformer has none"),
        ("naflexvit_base_patch16_gap", "NaFlexVit has none"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer has none"),
        ("cait_xxs24_224", r"input of blocks\.23\.mlp does not begin with it in a Cait"),
        ("volo_d1_224", r"network\.\S+mlp does not begin with it in a VOLO"),
        ("convit_tiny", r"blocks\.9\.mlp does not begin with it in a ConVit"),
    ],
)
def test_image_level_routing_asks_for_a_class_token(name, message):
    model = on_meta(name)
    with pytest.raises(
        ValueError, match=f"image-level routing reads the class token, and.*{message}"
    ):
        upcycle(model, MoESpec(layers=3, experts=2))


@pytest.mark.parametrize(
    "name, per_image",
    [
        ("vit_medium_patch16_rope_reg1_gap_256", True),
        ("swin_tiny_patch4_window7_224", True),
        ("convnext_tiny", True),
        ("mobilevit_xxs", False),
        ("mobilevit_s", False),
    ],
)
def test_the_mean_token_is_that_of_an_image(name, per_image):
    model, spec = on_meta(name), MoESpec(layers=2, experts=2, pool="mean")
    modes = [module.training for module in model.modules()]
    if not per_image:
        with pytest.raises(ValueError, match=r"decides once an image.*sees 12 rows.* for 3 images"):
            upcycle(model, spec)
        assert [module.training for module in model.modules()] == modes
        upcycle(model, MoESpec(layers=2, experts=2, router="token"))
    else:
        upcycle(model, spec)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("fields", [{"pool": "mean"}, {"router": "manual", "groups": ((0,), (1,))}])
def test_images_of_one_channel(name, fields):
    balance = {"balance": "none"} if "router" in fields else {}
    spec = MoESpec(layers=1, experts=2, **fields, **balance)
    assert len(block_mlps(upcycle(on_meta(name, in_chans=1), spec))) == 12
