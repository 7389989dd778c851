"""The accounting of a training step, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.measure.memory import MIB, step_mib


def test_by_hand():
    model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 8, bias=False))
    model[2].weight.requires_grad_(False)
    x = torch.randn(32, 64)
    found = step_mib(model, lambda: model(x).square().sum())
    first, second = 64 * 256 * 4, 256 * 8 * 4
    assert found["weights"] == (first + second) / MIB
    # the second weight is frozen
    assert found["gradients"] == first / MIB and found["optimiser"] == 2 * first / MIB
    # Saved: the input, the output of the ReLU (the frozen layer needs its weight alone), and the
    # logits, which are squared.
    assert found["activations"] == (32 * 64 + 32 * 256 + 32 * 8) * 4 / MIB
    assert found["total"] == pytest.approx(
        sum(value for name, value in found.items() if name != "total")
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_memory_counts_once_and_a_narrower_layer_needs_less():
    x = torch.randn(16, 32)
    wide, narrow = (nn.Sequential(nn.Linear(32, h), nn.GELU(), nn.Linear(h, 4)) for h in (128, 32))
    by = [
        step_mib(model, lambda model=model: model(x).sum() + model(x[:8]).sum() * 0)
        for model in (wide, narrow)
    ]
    assert all(by[0][kind] > by[1][kind] for kind in by[0])
    twice = step_mib(wide, lambda: (y := wide[0](x)).mul(y).sum())  # y is saved for both factors
    assert twice["activations"] == pytest.approx((16 * 32 + 16 * 128) * 4 / MIB)
