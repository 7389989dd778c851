"""One MLP into experts of its neurons, or into a narrower MLP.

Tokens are clustered (MoEE, 2505.15414); each cluster keeps the neurons that vary most on it; a
router sends a token to the cluster whose mean input it is nearest to. With one set of neurons for
all tokens this is static pruning by variance (VBP, 2507.12988).

Axis letters: **n** tokens, **D** width, **K** clusters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..spec import ExtractSpec
from .assemble import mixture, narrow_mlp
from .correction import common_part, corrected_weights
from .moefication import moefied
from .neurons import ExpertTokens, choose_neurons, pool_moments
from .record import LayerCalibration
from .report import dense_report, layer_report
from .token_clusters import centres_and_members, cluster_tokens, router_to


@torch.no_grad()
def extract_layer(
    mlp: nn.Module,
    calibration: LayerCalibration,
    rules: ExtractSpec,
    active: int | None,
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """Makes the layer that takes the place of `mlp`; returns it and a report on it.

    active: neurons that a token passes; None with neurons.variance_percent. seed: of clusters.

    The report is that of `layer_report` or `dense_report`, and noise (share of the clustered tokens
    that is in no cluster), stability (of HDBSCAN's clusters, else None), tokens (n). A layer with
    fewer than two clusters stays as it is; a class token that is set apart is none of these two.
    """
    if rules.clusters.of == "nothing":
        return _narrowed(mlp, calibration, rules, active)
    if rules.clusters.of == "neurons":
        return moefied(mlp, calibration, rules, seed)
    return _experts_of_clusters(mlp, calibration, rules, active, seed)


def _experts_of_clusters(
    mlp: nn.Module,
    calibration: LayerCalibration,
    rules: ExtractSpec,
    active: int | None,
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """An expert for each cluster of tokens, and a router to them (MoEE)."""
    tokens = calibration.tokens
    clusters, stable = cluster_tokens(tokens, rules.clusters, seed)
    about = {"noise": clusters.noise, "stability": stable, "tokens": len(tokens.inputs)}
    if clusters.count < 2:
        return mlp, about | dense_report(mlp, clusters.count)
    centres, expert_of_token = centres_and_members(tokens, clusters, rules.clusters, seed)
    router = router_to(centres, expert_of_token, mlp, tokens, rules)
    routed_to = router.scores(tokens.inputs).argmax(dim=1)
    if rules.neurons.statistics == "routed":
        expert_of_token = routed_to
    common = common_part(mlp, tokens.hidden, calibration.target, rules)
    experts = _tokens_of_experts(tokens.hidden, common.rest, expert_of_token, len(centres), rules)
    common_neurons = tokens.hidden.shape[1] - len(common.free_neurons)
    of_an_expert = None if active is None else active - common_neurons
    kept_neurons = choose_neurons(mlp, experts, rules, of_an_expert, common.free_neurons)
    weights = [
        corrected_weights(mlp, expert, neurons, rules, common.weights is not None)
        for expert, neurons in zip(experts, kept_neurons, strict=True)
    ]
    layer = mixture(mlp, weights, kept_neurons, router, common.weights, rules.storage)
    report = layer_report(layer, calibration, routed_to, kept_neurons, centres, common_neurons)
    return layer, about | report


def _tokens_of_experts(
    hidden: Tensor, target: Tensor, expert_of_token: Tensor, count: int, rules: ExtractSpec
) -> list[ExpertTokens]:
    """The tokens of each expert; of an expert with fewer than two, all that are in a cluster."""
    in_a_cluster = (expert_of_token >= 0).nonzero()[:, 0]
    experts = []
    for k in range(count):
        index = (expert_of_token == k).nonzero()[:, 0]
        index = index if len(index) > 1 else in_a_cluster
        experts.append(ExpertTokens(hidden, target, index, rules))
    if rules.correction.pooled:
        pool_moments(experts, hidden, target, in_a_cluster)
    return experts


def _narrowed(
    mlp: nn.Module, calibration: LayerCalibration, rules: ExtractSpec, active: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """A narrower MLP, the same for all tokens: static pruning."""
    hidden, inputs = calibration.tokens.hidden, calibration.tokens.inputs
    all_tokens = torch.arange(len(hidden), device=hidden.device)
    all_neurons = torch.arange(hidden.shape[1], device=hidden.device)
    tokens = ExpertTokens(hidden, calibration.target, all_tokens, rules)
    kept_neurons = choose_neurons(mlp, [tokens], rules, active, all_neurons)
    layer = narrow_mlp(mlp, corrected_weights(mlp, tokens, kept_neurons[0], rules))
    only_expert = torch.zeros_like(all_tokens)
    centre = inputs.mean(dim=0, keepdim=True)
    report = layer_report(layer, calibration, only_expert, kept_neurons, centre, 0)
    return layer, {"noise": 0.0, "stability": None, "tokens": len(inputs)} | report
