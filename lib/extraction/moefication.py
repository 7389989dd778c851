"""MoEfication (2110.01786): experts are clusters of neurons with similar input weights.

A token passes several of them; no neuron is removed.

Axis letters: **n** tokens, **D** width, **H** hidden width, **E** experts, **K** experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.experts import Experts
from ..models.mlps import maps_of
from ..models.moe import MoELayer
from ..routers.centroid import CentroidRouter
from ..routers.predictor import PredictorRouter
from ..spec import ExtractSpec
from .clusters import balanced_kmeans
from .correction import weights_of
from .record import LayerCalibration, RecordedTokens
from .report import layer_report

STEPS, BATCH, RATE = 400, 1024, 3e-3  # of the router's training: steps, tokens a step, AdamW's rate


def experts_per_token(rules: ExtractSpec) -> int:
    """Returns K: of clusters of neurons as many as the active share makes, else one."""
    if rules.clusters.of != "neurons":
        return 1
    return max(1, round(rules.neurons.active * rules.clusters.count))


def moefied(
    mlp: nn.Module, calibration: LayerCalibration, rules: ExtractSpec, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Makes experts of clusters of neurons; returns the layer and a report on it.

    mlp: not gated. seed: of the clusters and of the router's training.
    """
    maps = maps_of(mlp)
    count, k = rules.clusters.count, experts_per_token(rules)
    w1, b1, w2, b2 = weights_of(mlp)
    labels = balanced_kmeans(F.normalize(w1, dim=1), count, seed)
    cluster_of_neuron = torch.from_numpy(labels).to(w1.device)
    neurons = [(cluster_of_neuron == e).nonzero()[:, 0] for e in range(count)]
    mean_rows = torch.stack([w1[index].mean(dim=0) for index in neurons])
    if rules.router == "cosine":
        router = CentroidRouter.of(mean_rows, top_k=k)
    else:
        router = trained_router(mean_rows, neurons, calibration.tokens, k, seed)
    # a token's output is the sum of K experts: each gives its part of the bias
    weights = [(w1[index], b1[index], w2[:, index], b2 / k) for index in neurons]
    experts = Experts.of(weights, maps.act)
    maps.freeze_alike(experts.fc1, experts.fc2)
    layer = MoELayer(router, experts, channels_first=maps.channels_first)
    chosen = router.scores(calibration.tokens.inputs).topk(k, dim=1).indices.flatten()
    report = layer_report(layer, calibration, chosen, neurons, mean_rows, 0)
    # of mean inputs, and of sets that overlap: clusters of neurons have neither
    del report["cosine"], report["overlap"]
    return layer, report | {"noise": 0.0, "active": k * maps.hidden / count}


@torch.enable_grad()
def trained_router(
    mean_rows: Tensor, neurons: Sequence[Tensor], tokens: RecordedTokens, k: int, seed: int
) -> PredictorRouter:
    """Trains a router to predict each expert's sum of positive activations on a token.

    The sums are divided by the token's largest. mean_rows: (E, D) mean input weights of the
    experts' neurons, which the router starts from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = PredictorRouter(mean_rows.shape[1], len(neurons), k).to(mean_rows.device)
        router.fc1.weight.data.copy_(F.normalize(mean_rows, dim=1))
        sums = [tokens.hidden[:, index].relu().sum(dim=1) for index in neurons]
        wanted = torch.stack(sums, dim=1)  # (n, E)
        wanted = wanted / wanted.amax(dim=1, keepdim=True).clamp_min(1e-12)
        optimiser = torch.optim.AdamW(router.parameters(), lr=RATE)
        for _ in range(STEPS):
            index = torch.randint(len(wanted), (min(BATCH, len(wanted)),))
            optimiser.zero_grad(set_to_none=True)
            scores = router.scores(tokens.inputs[index])
            F.binary_cross_entropy_with_logits(scores, wanted[index]).backward()
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return router.requires_grad_(True)
