"""One small MLP, tokens to extract experts from it with, and rules, for the tests of extraction."""

from __future__ import annotations

import copy

import torch
from timm.layers import Mlp

from lib.extraction.layer import extract_layer
from lib.extraction.record import LayerCalibration, RecordedTokens
from lib.spec import ClusterSpec, ExtractSpec

D, H = 6, 16
STATIC = ClusterSpec(of="nothing")
OF_NEURONS = ClusterSpec(of="neurons", count=4)


def small_mlp(seed=0):
    torch.manual_seed(seed)
    return Mlp(D, H).eval()


def calibration_of(mlp, n=600, seed=1, groups=3):
    """Tokens in separate groups, 20 of an image, and what the layer gives."""
    generator = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(groups, D, generator=generator)
    x = centre[torch.arange(n) % groups] + 0.4 * torch.randn(n, D, generator=generator)
    number = torch.arange(n)
    with torch.no_grad():
        tokens = RecordedTokens(x, mlp.act(mlp.fc1(x)), number // 20, number % 20)
        return LayerCalibration(tokens, mlp(x))


def rules(**parts):
    """k-means of three clusters and half of the neurons, unless `parts` say otherwise."""
    neurons, clusters = parts.get("neurons", {}), parts.get("clusters", {})
    if "variance_percent" not in neurons:
        neurons = {"active": 0.5} | neurons
    if isinstance(clusters, dict):
        clusters = {"method": "kmeans", "count": 3, "sample": 600} | clusters
    return ExtractSpec(**parts | {"neurons": neurons, "clusters": clusters})


def extracted_layer(mlp, calibration, rules, active=None):
    """A layer extracted from a copy of `mlp`, and its report. active: neurons a token passes."""
    if active is None and rules.neurons.active is not None:
        active = round(rules.neurons.active * H)
    return extract_layer(copy.deepcopy(mlp), calibration, rules, active, seed=0)


def output_of(layer, x):
    return layer(x.unsqueeze(0))[0]
