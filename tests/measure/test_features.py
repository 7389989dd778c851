"""Features of a block are its class token, where there is one, and no other token in its place."""

import pytest
import timm
import torch

from lib.measure.features import features
from lib.models.upcycle import upcycle
from lib.runs.checks import check
from lib.spec import MoESpec, RunSpec

VIT = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}
IMAGES = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))


class FiveImages:
    def __len__(self):
        return len(IMAGES)

    def batch(self, index, spec):
        return IMAGES[index]


def mean_patch(tokens, prefix):
    return tokens[:, prefix:].mean(dim=1)


@pytest.mark.parametrize(
    "options, prefix, has_class_token",
    [
        ({}, 1, True),
        ({"reg_tokens": 4}, 5, True),
        ({"class_token": False, "global_pool": "avg"}, 0, False),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 1}, 1, False),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 4}, 4, False),
    ],
)
@pytest.mark.parametrize("mixture", [False, True])
def test_of_the_class_token_or_of_the_mean_patch(
    options, prefix, has_class_token, mixture, monkeypatch
):
    monkeypatch.setattr("lib.measure.features.BATCH", 2)
    torch.manual_seed(0)
    # a norm before the pooling, too: by default models without class token have it behind
    model = timm.create_model("vit_tiny_patch16_224", **VIT, **options, fc_norm=False).eval()
    if mixture:
        upcycle(model, MoESpec(layers=1, experts=2, router="token"))
    first, last = features(model, FiveImages(), RunSpec())
    with torch.no_grad():
        tokens = model.forward_features(IMAGES)
    wanted = tokens[:, 0] if has_class_token else mean_patch(tokens, prefix)
    torch.testing.assert_close(torch.from_numpy(last), wanted, atol=1e-5, rtol=1e-4)
    assert first.shape == last.shape == (5, 16) and not (first == last).all()


@pytest.mark.parametrize("probe", ["depth_probe", "cam_probe"])
@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"backbone": {"name": "convnext_atto"}, "data": {"image_size": 32}}, "ConvNeXt"),
        ({"backbone": {"name": "swin_tiny_patch4_window7_224"}}, "SwinTransformer"),
        ({"moe": {"experts": 2, "router": "token", "members": 2}}, "an ensemble of it"),
        ({"train": {"mask": {"ratio": 0.5, "width": 16, "heads": 2}}}, "a masked autoencoder"),
    ],
)
def test_what_a_probe_cannot_read_is_refused_before_any_work(probe, changes, kind):
    backbone = {"patch": 7, "width": 16, "depth": 2, "heads": 2}
    spec = RunSpec(**{"backbone": backbone, "data": {"image_size": 28}, probe: True} | changes)
    with pytest.raises(ValueError, match=f"{probe}=True needs .* and the model is {kind}"):
        check(spec)
    check(spec.but(**{probe: False}))
    check(RunSpec(backbone=backbone, data={"image_size": 28}, **{probe: True}))
