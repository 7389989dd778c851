"""Probes of routing: how even, how sure, how specialised. Functions of a `Routing` or of a count table, nothing else.

The table functions need numpy alone, so a record is enough to redraw every number; `RoutingProbe` fills such tables while a
model is evaluated. Entropies and informations are in nats.

Axis letters: **B** images, **N** tokens of an image (the class token is position 0), **T** = B*N, **E** experts, **K**
experts per token, **C** classes, **M** MoE layers from the shallowest to the deepest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch is not needed to read records
    from lib.models.routing import Routing

__all__ = ["Information", "RoutingProbe", "cv", "entropy", "first_choice", "information", "layers_for_degree", "load_share",
           "max_vio", "plateau_layers", "router_entropy", "routing_degree", "sharpness", "suggested_layers"]


# ---------------------------------------------------------------- load


def load_share(counts: np.ndarray) -> np.ndarray:
    """(..., E) assignments -> (..., E) shares that sum to 1; uniform where nothing was assigned."""
    counts = np.asarray(counts, float)
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.where(total > 0, total, 1), 1 / counts.shape[-1])


def cv(load: np.ndarray) -> float:
    """Coefficient of variation of the load (E,): population standard deviation / mean. 0 = even, sqrt(E-1) = one expert."""
    load = np.asarray(load, float)
    return float(load.std() / load.mean())


def max_vio(load: np.ndarray) -> float:
    """Largest excess (max - mean) / mean of the load (E,). 0 = even, E-1 = one expert (loss-free balancing, 2408.15664)."""
    load = np.asarray(load, float)
    return float(load.max() / load.mean() - 1)


# ---------------------------------------------------------------- entropy and information


def entropy(p: np.ndarray) -> np.ndarray:
    """(..., E) probabilities -> (...) entropies in nats, between 0 and ln E."""
    p = np.asarray(p, float)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def router_entropy(routing: Routing) -> float:
    """Mean entropy in nats of the router's decisions (R, E). Bound: ln E (a router that does not choose)."""
    return float(entropy(_numpy(routing.probs)).mean())


@dataclass(frozen=True)
class Information:
    """What a table of attribute by expert says about specialisation.

    mutual: plug-in I(attribute; expert) in nats. normalised: I / H(expert). corrected: the same after the Miller-Madow term
    was taken from I, cut at 0. bias: that term in nats (positive: the plug-in value is too large).
    expert_entropy: H(expert) in nats, the bound of I.
    """

    mutual: float
    normalised: float
    corrected: float
    bias: float
    expert_entropy: float


def information(counts: np.ndarray, samples: int | None = None) -> Information:
    """Mutual information between rows (classes or positions) and experts of a count table (rows, E).

    Normalised by H(expert) (Theil's U): 1 if and only if the row decides the expert, 0 if and only if they are independent.
    The symmetric 2I / (H(row) + H(expert)) is not used: with 100 classes and 8 experts it ends at
    2 ln 8 / (ln 100 + ln 8) = 0.62 even for a perfect router. One expert for everything has H(expert) = 0 and gives 0.

    The plug-in estimate is too large by about (cells - rows - columns + 1) / 2n, counting those that are not empty
    (Miller 1955). samples: n, the number of independent draws; default: the sum of the table, right for image-level
    top-1. Tokens of one image are not independent, so pass the number of images for token-level class tables.
    """
    table = np.asarray(counts, float)
    if table.ndim != 2 or (table < 0).any() or not table.sum() > 0:
        raise ValueError(f"counts must be a (rows, E) table of non-negative numbers with a positive sum, got shape "
                         f"{table.shape} and sum {table.sum() if table.size else 0}")
    n = table.sum() if samples is None else samples
    p = table / table.sum()
    rows, columns = p.sum(1), p.sum(0)
    h_expert = float(entropy(columns))
    mutual = max(0.0, float(entropy(rows)) + h_expert - float(entropy(p.ravel())))
    bias = (np.count_nonzero(p) - np.count_nonzero(rows) - np.count_nonzero(columns) + 1) / (2 * n)
    if h_expert < 1e-12:
        return Information(mutual, 0.0, 0.0, bias, h_expert)
    corrected = min(1.0, max(0.0, mutual - bias) / h_expert)
    return Information(mutual, min(1.0, mutual / h_expert), corrected, bias, h_expert)


def sharpness(counts: np.ndarray) -> float:
    """Mean share of a class's assignments that go to its favourite expert; (C, E) counts, classes with no image left out.

    Between 1/E (blurred) and 1 (each class has one expert). Unlike mutual information it is also 1 if all
    classes share one expert.
    """
    table = np.asarray(counts, float)
    table = table[table.sum(1) > 0]
    return float(load_share(table).max(1).mean())


# ---------------------------------------------------------------- degree


def routing_degree(experts: int, top_k: int, layers: int) -> int:
    """C(E, K)^L: the number of different expert combinations that an image can meet (ViMoE, section 4.3)."""
    if not 1 <= top_k <= experts or layers < 0:
        raise ValueError(f"need 1 <= top_k <= experts and layers >= 0, got experts={experts}, top_k={top_k}, "
                         f"layers={layers}")
    return math.comb(experts, top_k) ** layers


def layers_for_degree(experts: int, top_k: int, degree: int) -> int:
    """Smallest L with C(E, K)^L >= degree. With C(E, K) = 1 no L suffices beyond degree 1: ValueError."""
    if routing_degree(experts, top_k, 1) == 1 and degree > 1:
        raise ValueError(f"experts={experts}, top_k={top_k} has one combination at any depth: "
                         f"degree {degree} is out of reach")
    layers = 0
    while routing_degree(experts, top_k, layers) < degree:
        layers += 1
    return layers


def suggested_layers(values: Sequence[float], threshold: float = 0.3) -> int:
    """Number of MoE layers worth having: the unbroken run of deepest layers that exceed the threshold.

    values: (M,) normalised information of class and expert, shallow to deep. The run starts at the deepest layer since L
    counts from there; a lone sharp layer further up cannot be had without those below it.
    """
    layers = 0
    for value in reversed(list(values)):
        if not value > threshold:
            break
        layers += 1
    return layers


def plateau_layers(accuracy: dict[int, float], tolerance: float) -> int:
    """Smallest L whose accuracy is within `tolerance` (same unit) of the best of {L: accuracy}."""
    if not accuracy:
        raise ValueError("accuracy is empty: give {number of MoE layers: accuracy} with at least one entry")
    best = max(accuracy.values())
    return min(layers for layers, value in accuracy.items() if value >= best - tolerance)


# ---------------------------------------------------------------- from a model


def _numpy(tensor: Any) -> np.ndarray:
    # bfloat16 has no numpy type
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def first_choice(routings: Sequence[Routing]) -> np.ndarray:
    """(M, B, N) int16 first choice of each token, before dropping; -1 pads layers with fewer tokens (Swin)."""
    maps = [_numpy(r.token_choice()[..., 0]) for r in routings]
    out = np.full((len(maps), maps[0].shape[0] if maps else 0, max((m.shape[1] for m in maps), default=0)), -1, np.int16)
    for row, m in zip(out, maps, strict=True):
        row[:, :m.shape[1]] = m
    return out


class _LayerCounts:
    """Running sums of one layer."""

    def __init__(self, block: int, experts: int, tokens: int, classes: int):
        self.block, self.experts, self.tokens = block, experts, tokens
        self.by_class = np.zeros((classes, experts), np.int64)
        self.by_position = np.zeros((tokens, experts), np.int64)
        self.load = np.zeros(experts, np.int64)
        self.entropy = self.weight = 0.0
        self.decisions = self.choices = self.refused = self.images = self.distinct = 0

    def add(self, routing: Routing, labels: np.ndarray) -> None:
        """One batch. Tables count choices before dropping (what the router wanted); load, weight and distinct experts
        count what was served (what the experts did)."""
        b, n = routing.shape
        e = self.experts
        choice, probs = _numpy(routing.choice), _numpy(routing.probs)  # (R, K), (R, E)
        per_image = routing.per_image
        label = labels if per_image else np.repeat(labels, n)
        chosen = choice >= 0  # expert choice leaves tokens with fewer experts than others
        self.by_class += np.bincount((label[:, None] * e + choice)[chosen],
                                     minlength=self.by_class.size).reshape(self.by_class.shape)
        if per_image:
            self.by_position += np.bincount(choice[chosen], minlength=e)
        else:
            position = np.tile(np.arange(n), b)
            self.by_position += np.bincount((position[:, None] * e + choice)[chosen], minlength=n * e).reshape(n, e)
        expert, token = _numpy(routing.expert), _numpy(routing.token)
        self.load += np.bincount(expert, minlength=e)
        self.distinct += int(np.count_nonzero(np.bincount(token // n * e + expert, minlength=b * e)))
        self.weight += float(_numpy(routing.weight).sum(dtype=np.float64))
        self.entropy += float(entropy(probs).sum())
        self.decisions += len(probs)
        self.choices += int(chosen.sum()) * (n if per_image else 1)
        self.refused += int(_numpy(routing.dropped).sum())
        self.images += b

    def summary(self) -> dict[str, Any]:
        served = int(self.load.sum())
        return {"block": self.block, "load": load_share(self.load).tolist(), "entropy": self.entropy / self.decisions,
                "weight": self.weight / max(served, 1), "dropped": self.refused / max(self.choices, 1),
                "experts_per_image": self.distinct / self.images}


class RoutingProbe:
    """Accumulates the routing of an evaluation, layer by layer; sums only, so the cost does not grow with the test set.

        probe = RoutingProbe(num_classes)
        probe.update(tape.routings(), blocks, labels)   # per batch
        probe.summary(), probe.arrays()
    """

    def __init__(self, num_classes: int):
        self.classes = num_classes
        self._layers: list[_LayerCounts] = []

    def update(self, routings: Sequence[Routing], blocks: Sequence[int], labels: Any) -> None:
        """routings: one per MoE layer, shallow to deep; blocks: their 0-based block indices; labels: (B,) classes.

        ValueError if labels do not fit the images or classes, or if layers, experts or tokens change between batches.
        """
        labels = np.asarray(_numpy(labels) if hasattr(labels, "detach") else labels).astype(np.int64)
        if len(routings) != len(blocks):
            raise ValueError(f"one block index per routing: got {len(routings)} routings and {len(blocks)} blocks")
        if not routings:
            return
        if labels.shape != (routings[0].shape[0],):
            raise ValueError(f"labels have shape {labels.shape}, but the batch has {routings[0].shape[0]} images")
        if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
            raise ValueError(f"labels span {labels.min()}..{labels.max()}, valid is 0..{self.classes - 1}: "
                             f"make the probe with num_classes={labels.max() + 1} or map the labels")
        if not self._layers:
            self._layers = [_LayerCounts(block, r.experts, r.shape[1], self.classes)
                            for r, block in zip(routings, blocks, strict=True)]
        shapes = [(block, r.experts, r.shape[1]) for r, block in zip(routings, blocks, strict=True)]
        known = [(layer.block, layer.experts, layer.tokens) for layer in self._layers]
        if shapes != known:
            raise ValueError(f"layers changed between batches: (block, experts, tokens) was {known}, is {shapes}; "
                             "use a new RoutingProbe for another model or image size")
        for layer, routing in zip(self._layers, routings, strict=True):
            layer.add(routing, labels)

    def summary(self) -> list[dict[str, Any]]:
        """Per layer: block, load (E shares of the served assignments), entropy (nats, mean over decisions), weight
        (mean gate weight of served assignments), dropped (share of choices refused), experts_per_image (mean number of
        distinct routed experts)."""
        return [layer.summary() for layer in self._layers]

    def arrays(self) -> dict[str, np.ndarray]:
        """class_expert (M, C, E) and position_expert (M, N, E), int32 counts of choices before dropping.

        Image-level layers count images (times K), token-level layers tokens (times K); at image level all positions of an
        image are alike. Layers with fewer experts or tokens are padded with zeros to the largest.
        """
        experts = max((layer.experts for layer in self._layers), default=0)
        tokens = max((layer.tokens for layer in self._layers), default=0)
        by_class = np.zeros((len(self._layers), self.classes, experts), np.int32)
        by_position = np.zeros((len(self._layers), tokens, experts), np.int32)
        for i, layer in enumerate(self._layers):
            if layer.by_class.max(initial=0) > np.iinfo(np.int32).max:
                raise OverflowError(f"a count of block {layer.block} exceeds 2^31-1: evaluate on fewer images")
            by_class[i, :, :layer.experts] = layer.by_class
            by_position[i, :layer.tokens, :layer.experts] = layer.by_position
        return {"class_expert": by_class, "position_expert": by_position}
