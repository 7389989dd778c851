"""The static model that bounds an extracted one, and times of whole models."""

import pytest
import torch
from torch import nn
from vits import H, batch, build

from lib.measure.latency import forward_ms, static_counterpart


def test_static_counterpart_is_as_wide_as_what_a_token_passes():
    dense = build()
    layers = [{"layer": "blocks.0.mlp", "active": 10.6}, {"layer": "blocks.1.mlp", "active": 0.2}]
    static = static_counterpart(dense, layers)
    assert [block.mlp.fc1.out_features for block in static.blocks] == [11, 1]
    assert [block.mlp.fc1.out_features for block in dense.blocks] == [H, H]
    whole, part = dense.blocks[0].mlp, static.blocks[0].mlp
    assert torch.equal(part.fc1.weight, whole.fc1.weight[:11])
    assert torch.equal(part.fc2.weight, whole.fc2.weight[:, :11])
    assert static(batch()[0]).shape == dense(batch()[0]).shape


class Waits(nn.Module):
    """Records what it is called with, and takes so many squares of a matrix."""

    def __init__(self, products):
        super().__init__()
        self.products, self.seen = products, []

    def forward(self, images):
        self.seen.append((images, torch.is_inference_mode_enabled()))
        matrix = torch.ones(128, 128)
        for _ in range(self.products):
            matrix = matrix @ matrix / 128
        return matrix


def test_times_of_each_model_on_the_same_images_without_gradients():
    images, models = batch(2)[0], {"slow": Waits(200), "fast": Waits(1)}
    ms = forward_ms(models, images)
    assert list(ms) == ["slow", "fast"]
    assert ms["slow"] > ms["fast"] > 0
    for model in models.values():
        assert len(model.seen) >= 20
        assert all(given is images and inference for given, inference in model.seen)


def test_layers_that_the_model_lacks_are_named():
    with pytest.raises(ValueError, match="blocks.7.mlp"):
        static_counterpart(build(), [{"layer": "blocks.7.mlp", "active": 3.0}])
