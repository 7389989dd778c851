"""Times of whole models."""

import torch
from torch import nn
from vits import batch

from lib.measure.latency import latencies


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
    ms = {name: time.median for name, time in latencies(models, images).items()}
    assert list(ms) == ["slow", "fast"]
    assert ms["slow"] > ms["fast"] > 0
    for model in models.values():
        assert len(model.seen) >= 20
        assert all(given is images and inference for given, inference in model.seen)
