"""Heads that were put on by hand, on models that still tell their first number of classes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from vits import batch, build

import lib

IMAGES, _ = batch(4)


def with_head(name, head, **changes):
    """A small model of timm, built for 5 classes, with another head."""
    model = build() if name == "vit" else timm.create_model(name, num_classes=5, **changes)
    places = {"vit": "head", "test_convnext": "head.fc", "test_resnet": "fc"}
    old = model.get_submodule(places[name])
    model.set_submodule(places[name], head(old.in_features))
    return model.eval()


@pytest.mark.parametrize("name", ["vit", "test_convnext", "test_resnet"])
@pytest.mark.parametrize(
    "head, outputs", [(lambda d: nn.Linear(d, 7), 7), (lambda d: nn.Identity(), None)]
)
def test_a_head_that_was_put_on_by_hand_is_restored(name, head, outputs, tmp_path):
    model = with_head(name, head)
    lib.save(model, tmp_path / "model.safetensors")
    again = lib.restore(tmp_path / "model.safetensors")
    images = IMAGES if name == "vit" else IMAGES.repeat(1, 1, 2, 2)
    with torch.no_grad():
        want, got = model(images), again(images)
    assert torch.equal(want, got) and outputs in (None, want.shape[1])


def test_a_pruned_model_with_a_head_put_on_by_hand_gets_names_for_it(tmp_path):
    file, names = tmp_path / "model.safetensors", list("abcdefg")
    model = lib.prune(with_head("vit", lambda d: nn.Linear(d, 7)), [batch(12)])
    lib.save(model, file, class_names=names)
    again = lib.restore(file)
    assert again.class_names == names and torch.equal(again(IMAGES), model(IMAGES))
    lib.save(again, file)  # and once more
    assert torch.equal(lib.restore(file)(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match="class_names has 5 names, the model 7 outputs"):
        lib.save(model, file, class_names=names[:5])
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
    lib.save(model, file, arguments=sizes | {"num_classes": 7})
    assert torch.equal(lib.restore(file)(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    "head, differs",
    [
        (lambda d: nn.Sequential(nn.Linear(d, 9), nn.Linear(9, 7)), "head is a Sequential"),
        (lambda d: nn.Linear(d, 7, bias=False), "head.bias is in the built model alone"),
    ],
    ids=["several layers", "no bias"],
)
def test_heads_that_timm_does_not_build_are_named_with_what_to_do(head, differs, tmp_path):
    with pytest.raises(ValueError, match=f"{differs}.*put it into an nn.Module of your class"):
        lib.save(with_head("vit", head), tmp_path / "model.safetensors")
