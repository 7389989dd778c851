"""Merging of whole experts, and of the neurons of dropped ones into those of others.

Sources: 2407.09590 for similar experts; DERN, 2509.10377, for neurons of dropped ones. Both leave a
model that reroutes among E' experts.

Axis letters: **B** images, **T** tokens, **D** width, **H** hidden width, **E** experts of a layer,
**E'** those that stay.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster import hierarchy
from torch import Tensor, nn

from ...models.compete import responses
from ...models.moe import MoELayer
from ...models.pruned import stacks_of, with_stacks
from ...routers.base import Routing
from ...routers.group import GroupRouter
from .dropping import check_choices, drop_experts, resized_router, routed
from .scores import calibrate, keep_by_score, observe, remaining

# Segments whose cosine is below it are thrown away; 2509.10377 finds moderate values best, 0.4 or
# more.
LEAST_COSINE = 0.4


# ---- merging by output similarity


@torch.no_grad()
def merge_similar(model: nn.Module, batches: Iterable[Tensor], share: float) -> nn.Module:
    """Merges experts with similar outputs until a share of them is gone, in place (2407.09590).

    Experts are clustered by average linkage on `output_similarity`. The weights and the router rows
    of a cluster become their mean, weighted by load on the calibration images (plain where nobody
    was used). Simplified against the paper: one similarity (cosine of outputs) instead of a choice,
    and no learnt coefficients. Neurons are not aligned before the mean, which is harmless for
    experts that started as copies and harmful for others.

    batches: images (B, channels, height, width). Returns the model.
    Raises ValueError for a share that is no whole number of experts, a router whose groups must not
    mix, too few experts for the router's K, and as `calibrate`.
    """
    batches = list(batches)  # read twice
    calibration_of_layer = calibrate(model, batches)
    similarity_of_layer = output_similarity(model, batches)
    merged = {}
    for name, layer in routed(model).items():
        if isinstance(layer.router, GroupRouter):
            raise ValueError(
                f"{name} is of an ensemble: merging would mix experts of different members"
            )
        clusters = average_linkage(
            similarity_of_layer[name], remaining(layer.router.experts, share)
        )
        load = calibration_of_layer[name].score(0, 0, 0)
        mean = _means(clusters, load)
        router = resized_router(
            layer.router, len(clusters), lambda rows, mean=mean: _mixed(mean, rows)
        )
        check_choices(name, router)
        stacks = [_mixed(mean, stack) for stack in stacks_of(layer.experts)]
        merged[layer] = (router, with_stacks(layer.experts, stacks))
    for layer, (router, experts) in merged.items():  # only now, so that an error changes nothing
        layer.router, layer.experts = router, experts
    return model


@torch.no_grad()
def output_similarity(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Computes the mean cosine between the outputs of two experts, {layer: (E, E) float64}.

    The mean is over all calibration tokens; every expert runs on every token.
    """
    sums: dict[str, Tensor] = {}
    token_counts: dict[str, int] = {}

    def add(name: str, layer: MoELayer, tokens: Tensor, _: Routing) -> None:
        unit = F.normalize(responses(layer.experts, tokens).double(), dim=-1)  # (T, E, D)
        sums[name] = sums.get(name, 0) + torch.einsum("tid,tjd->ij", unit, unit).cpu()
        token_counts[name] = token_counts.get(name, 0) + len(tokens)

    observe(model, batches, add)
    return {name: total / token_counts[name] for name, total in sums.items()}


def average_linkage(similarity: Tensor, clusters: int) -> list[list[int]]:
    """Joins the two clusters of experts with the largest mean similarity, until so many are left.

    similarity: (E, E). Clusters are ascending and ordered by their first expert. Among equal
    similarities the order is that of SciPy's linkage, and not that of the experts' numbers.
    """
    experts = len(similarity)
    if clusters == experts:
        return [[e] for e in range(experts)]
    # Counted from the largest similarity, since 1 - similarity may round to a negative distance.
    distance = (similarity.max() - similarity).numpy()[np.triu_indices(experts, k=1)]
    tree = hierarchy.linkage(distance, "average")
    # Split by the number of each join and not by its height: of joins at equal height "maxclust"
    # makes all or none, which would leave fewer clusters.
    labels = hierarchy.fcluster(
        tree, clusters, "maxclust_monocrit", monocrit=np.arange(experts - 1.0)
    )
    _, first = np.unique(labels, return_index=True)
    return [np.flatnonzero(labels == labels[e]).tolist() for e in sorted(first)]


def _means(clusters: list[list[int]], load: Tensor) -> Tensor:
    """Computes the matrix (E', E) that takes the load-weighted mean of each cluster."""
    member = torch.zeros(len(clusters), len(load), dtype=torch.float64)
    for row, cluster in zip(member, clusters, strict=True):
        row[cluster] = 1.0
    weight = member * load
    idle = weight.sum(dim=1, keepdim=True) == 0
    weight = torch.where(idle, member, weight)
    return weight / weight.sum(dim=1, keepdim=True)


def _mixed(matrix: Tensor, tensor: Tensor) -> Tensor:
    """Multiplies (E', E) with (E, ...) to (E', ...), in the tensor's type."""
    flat = matrix.to(tensor.device) @ tensor.detach().double().flatten(1 if tensor.ndim > 1 else 0)
    return flat.view(len(matrix), *tensor.shape[1:]).to(tensor.dtype)


# ---- neurons of dropped experts handed to others


@torch.no_grad()
def dern(model: nn.Module, batches: Iterable[Tensor], share: float) -> nn.Module:
    """Drops a share of the experts and hands their neurons to the others, in place (2509.10377).

    1. Experts are dropped by a router statistic, the sum of their gates on calibration images.
    2. A dropped expert is split into H segments, a neuron's fc1 row, fc1 bias and fc2 column; each
       goes to the neuron of any expert that stays that it is most similar to, by cosine, unless the
       cosine is below `LEAST_COSINE`.
    3. Each neuron that stays becomes the mean of itself and the segments it got, weighted by the
       gate sums of the experts they come from; the width stays H.
    Simplified against the paper: segments are merged into the nearest neuron in one step, where the
    paper clusters an expert's own and foreign segments anew; output biases of dropped experts are
    lost.

    Returns the model. Raises ValueError for gated experts, whose neurons have a gate row besides,
    and as `calibrate`, `keep_by_score` and `drop_experts` with "reroute" do.
    """
    if gated := [name for name, layer in routed(model).items() if layer.experts.gated]:
        raise ValueError(
            f"{', '.join(gated)}: DERN hands over neurons of one input row, and experts of a gated "
            "MLP have two: drop experts by a score, or merge them"
        )
    gate_sums = {
        name: calibration.score(0, 1, 0) for name, calibration in calibrate(model, batches).items()
    }
    keep = keep_by_score(gate_sums, share)
    layers = routed(model)
    recombined = {
        name: _recombined(layer, keep[name], gate_sums[name]) for name, layer in layers.items()
    }
    drop_experts(model, keep, "reroute")
    for name, layer in layers.items():
        output_bias = layer.experts.fc2.bias.detach()
        layer.experts = with_stacks(layer.experts, [*recombined[name], output_bias])
    return model


def _recombined(layer: MoELayer, keep: Tensor, gate_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the neurons of dropped experts into those of the experts `keep`, (E',).

    Returns fc1.weight (E', H, D), fc1.bias (E', H) and fc2.weight (E', D, H).
    """
    w1, b1, w2, _ = (stack.detach() for stack in stacks_of(layer.experts))
    segments = torch.cat([w1, b1.unsqueeze(2), w2.transpose(1, 2)], dim=2)  # (E, H, 2D + 1)
    gate_sums = gate_sums.to(segments)
    neurons = segments[keep].flatten(0, 1)  # (E' H, 2D + 1)
    weight = gate_sums[keep].repeat_interleave(segments.shape[1])  # (E' H,)
    total, unit = neurons * weight.unsqueeze(1), F.normalize(neurons, dim=1)
    for e in sorted(set(range(len(segments))) - set(keep.tolist())):
        # (H,) the best cosine of each segment, and the neuron that it is with
        cosine, place = (F.normalize(segments[e], dim=1) @ unit.t()).max(dim=1)
        near = cosine >= LEAST_COSINE
        total = total.index_add(0, place[near], segments[e][near] * gate_sums[e])
        weight = weight.index_add(0, place[near], gate_sums[e].expand(int(near.sum())))
    # An expert that nobody used, with segments of others that nobody used: nothing to weigh them
    # by, so it stays.
    weight = weight.unsqueeze(1)
    mean = torch.where(weight > 0, total / weight.clamp_min(1e-30), neurons)
    mean = mean.view(segments[keep].shape)  # (E', H, 2D + 1)
    width = w1.shape[2]
    return (
        mean[..., :width].contiguous(),
        mean[..., width].contiguous(),
        mean[..., width + 1 :].transpose(1, 2).contiguous(),
    )
