"""Fewer experts without throwing any away: similar ones merged (2407.09590), or the dropped ones
recombined (DERN, 2509.10377).

Both leave a model that reroutes among E' experts; `DropStep.fit` gives another model
its structure.

Axis letters: **T** tokens, **D** width, **H** hidden width, **E** experts of a layer, **E'** those
that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.compete import responses
from ...models.moe import MoELayer
from ...routers.base import Routing
from ...routers.group import GroupRouter
from .dropping import check_room, drop_experts, resized, restacked, routed, stacks
from .scores import calibrate, keep_by_score, remaining, watch

ROUTER_ROWS = ("mean", "sum")


@torch.no_grad()
def merge_similar(
    model: nn.Module, batches: Sequence[Tensor], share: float, *, rows: str = "mean"
) -> nn.Module:
    """Merge experts with similar outputs until a share of them is gone, in place; returns the model
    (2407.09590).

    Experts are grouped by average linkage on `output_similarity`; a group's weights become their
    mean, weighted by load on the calibration images (plain where nobody was used). rows: its router
    rows become the same "mean", or their "sum". Simplified against the paper: one similarity
    (cosine of outputs) instead of a choice, and no learnt coefficients. Neurons are not aligned
    before the mean, which is harmless for experts that started as copies and harmful for others.

    batches: images (B, C, height, width), read twice, so a sequence. Raises ValueError for an
    unknown `rows`, a share that is no whole number of experts, a router whose groups must not mix,
    too few experts for the router's K, and as `calibrate`.
    """
    if rows not in ROUTER_ROWS:
        raise ValueError(f"rows={rows!r} is unknown: use one of {', '.join(ROUTER_ROWS)}")
    found, made = calibrate(model, batches), {}
    similarity = output_similarity(model, batches)
    for name, layer in routed(model).items():
        if isinstance(layer.router, GroupRouter):
            raise ValueError(
                f"{name} is of an ensemble: merging would mix experts of different members"
            )
        groups = linkage(similarity[name], remaining(layer.router.experts, share))
        mean, total = _mixing(groups, found[name].score(0, 0, 0))
        parts = [_mix(mean, stack) for stack in stacks(layer.experts)]
        by_row = mean if rows == "mean" else total
        router = resized(layer.router, len(groups), lambda t, by_row=by_row: _mix(by_row, t))
        check_room(name, router)
        made[layer] = (router, restacked(layer.experts, parts))
    for layer, (router, experts) in made.items():
        layer.router, layer.experts = router, experts
    return model


@torch.no_grad()
def output_similarity(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """{layer: (E, E)} mean over calibration tokens of the cosine between two experts' outputs,
    every expert on every token."""
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def add(name: str, layer: MoELayer, tokens: Tensor, _: Routing) -> None:
        unit = F.normalize(responses(layer.experts, tokens).double(), dim=-1)
        sums[name] = sums.get(name, 0) + torch.einsum("tid,tjd->ij", unit, unit).cpu()
        seen[name] = seen.get(name, 0) + len(tokens)

    watch(model, batches, add)
    return {name: total / seen[name] for name, total in sums.items()}


def linkage(similarity: Tensor, groups: int) -> list[list[int]]:
    """(E, E) similarities -> that many groups of experts: the two groups with the largest mean
    similarity merge, and again.

    Among equals the pair with the lowest numbers goes first. Groups are ascending, and ordered by
    their first expert.
    """
    found = [[e] for e in range(len(similarity))]
    while len(found) > groups:
        pairs = [(i, j) for i in range(len(found)) for j in range(i + 1, len(found))]
        i, j = max(
            pairs, key=lambda pair: float(similarity[found[pair[0]]][:, found[pair[1]]].mean())
        )
        found[i] = sorted(found[i] + found.pop(j))
    return found


def _mixing(groups: list[list[int]], load: Tensor) -> tuple[Tensor, Tensor]:
    """(E', E) matrices: the load-weighted mean of each group, and its sum."""
    total = torch.zeros(len(groups), len(load), dtype=torch.float64)
    for row, group in zip(total, groups, strict=True):
        row[group] = 1.0
    weight = total * load
    idle = weight.sum(dim=1, keepdim=True) == 0
    weight = torch.where(idle, total, weight)
    return weight / weight.sum(dim=1, keepdim=True), total


def _mix(matrix: Tensor, tensor: Tensor) -> Tensor:
    """(E', E) times (E, ...) -> (E', ...), in the tensor's type."""
    flat = matrix.to(tensor.device) @ tensor.detach().double().flatten(1 if tensor.ndim > 1 else 0)
    return flat.view(len(matrix), *tensor.shape[1:]).to(tensor.dtype)


@torch.no_grad()
def dern(
    model: nn.Module, batches: Iterable[Tensor], share: float, *, least: float = 0.4
) -> nn.Module:
    """Drop a share of the experts and hand their neurons to the ones that stay, in place; returns
    the model (2509.10377).

    1. Experts are dropped by a router statistic, the sum of their gates on calibration images.
    2. A dropped expert is cut into H segments, a neuron's fc1 row, fc1 bias and fc2 column; each
       goes to the neuron of any kept expert that it is most similar to, by cosine.
    3. Each kept neuron becomes the mean of itself and the segments it got, weighted by the gate
       sums of the experts they come from; the width stays H.
    Simplified against the paper: segments are merged into the nearest neuron in one step, where the
    paper clusters an expert's own and foreign segments anew; output biases of dropped experts are
    lost.

    least: segments whose cosine is below it are thrown away, -1 to 1; the paper finds moderate
    values best, 0.4 or more. Raises ValueError for a `least` outside [-1, 1], and as `calibrate`,
    `keep_by_score` and `drop_experts` with "reroute".
    """
    if not -1 <= least <= 1:
        raise ValueError(
            f"least={least} is a cosine below which segments are thrown away: valid is -1 to 1"
        )
    gates = {name: found.score(0, 1, 0) for name, found in calibrate(model, batches).items()}
    keep = keep_by_score(gates, share)
    layers = routed(model)
    merged = {
        name: _recombined(layer, keep[name], gates[name], least) for name, layer in layers.items()
    }
    drop_experts(model, keep, "reroute")
    for name, layer in layers.items():
        layer.experts = restacked(layer.experts, [*merged[name], layer.experts.fc2.bias.detach()])
    return model


def _recombined(
    layer: MoELayer, keep: Tensor, gates: Tensor, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """fc1.weight (E', H, D), fc1.bias (E', H), fc2.weight (E', D, H) after the neurons of the other
    experts were merged in."""
    w1, b1, w2, _ = (stack.detach() for stack in stacks(layer.experts))
    segments = torch.cat([w1, b1.unsqueeze(2), w2.transpose(1, 2)], dim=2)  # (E, H, 2D + 1)
    gates = gates.to(segments)
    own = segments[keep].flatten(0, 1)  # (E' H, 2D + 1)
    weight = gates[keep].repeat_interleave(segments.shape[1])
    total, unit = own * weight.unsqueeze(1), F.normalize(own, dim=1)
    for e in sorted(set(range(len(segments))) - set(keep.tolist())):
        cosine, place = (F.normalize(segments[e], dim=1) @ unit.t()).max(dim=1)
        near = cosine >= least
        total = total.index_add(0, place[near], segments[e][near] * gates[e])
        weight = weight.index_add(0, place[near], gates[e].expand(int(near.sum())))
    # An expert that nobody used, with segments of others that nobody used: nothing to weigh them
    # by, so it stays.
    mean = torch.where(
        weight.unsqueeze(1) > 0, total / weight.unsqueeze(1).clamp_min(1e-30), own
    ).view(segments[keep].shape)
    width = w1.shape[2]
    return (
        mean[..., :width].contiguous(),
        mean[..., width].contiguous(),
        mean[..., width + 1 :].transpose(1, 2).contiguous(),
    )
