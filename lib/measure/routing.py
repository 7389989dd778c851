"""Counts of routing decisions: which expert, for which class, at which position, and how surely.

`RoutingProbe` fills tables while a model is evaluated. The two functions need numpy alone, so a
record is enough to redraw every number. Entropies are in nats.

Axis letters: **B** images, **N** tokens of an image (the class token is position 0), **T** = B*N,
**E** experts, **K** experts per token, **C** classes, **M** MoE layers from the shallowest to the
deepest, **A** assignments, **R** decisions of a router: T, or B where one serves a whole image;
**I** images of the whole evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch is not needed to read records
    from ..routers.base import Routing

BOARD_CELLS = 4  # squares in a row of the checkerboard that records hold the routing of


def load_share(counts: np.ndarray) -> np.ndarray:
    """Turns (..., E) assignments into shares that sum to 1; uniform where nothing was assigned."""
    counts = np.asarray(counts, float)
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.where(total > 0, total, 1), 1 / counts.shape[-1])


def entropy(p: np.ndarray) -> np.ndarray:
    """Computes (...) entropies in nats, between 0 and ln E, of (..., E) probabilities."""
    p = np.asarray(p, float)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def _numpy(tensor: Any) -> np.ndarray:
    # bfloat16 has no numpy type
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


class _LayerCounts:
    """Running sums of one MoE layer."""

    def __init__(self, block: int, experts: int, tokens: int, classes: int, image_loads: bool):
        self.block, self.experts, self.tokens = block, experts, tokens
        self.image_loads = [] if image_loads else None  # (B, E) of each batch
        self.by_class = np.zeros((classes, experts), np.int64)
        self.by_position = np.zeros((tokens, experts), np.int64)
        self.assigned = np.zeros(experts, np.int64)
        self.entropy = self.weight = 0.0  # sums over decisions, and over assignments
        self.decisions = self.choices = self.refused = 0
        self.images = self.experts_of_images = 0  # the latter: distinct ones, summed over images

    def add(self, routing: Routing, labels: np.ndarray) -> None:
        """Takes in one batch; labels: (B,).

        Tables count choices before dropping (what the router wanted); assignments, weight and
        distinct experts count what was served (what the experts did).
        """
        b, n = routing.shape
        e, per_image = self.experts, routing.per_image
        choice, probs = _numpy(routing.choice), _numpy(routing.probs)  # (R, K), (R, E)
        chosen = choice >= 0  # expert choice leaves tokens with fewer experts than others
        label = labels if per_image else np.repeat(labels, n)  # (R,)
        self.by_class += _table(label, choice, chosen, self.by_class.shape)
        if per_image:  # all positions of an image are alike
            self.by_position += np.bincount(choice[chosen], minlength=e)
        else:
            position = np.tile(np.arange(n), b)  # (R,)
            self.by_position += _table(position, choice, chosen, (n, e))
        if self.image_loads is not None:
            # a decision on a whole image counts for each of its tokens
            image, weight = (np.arange(b), n) if per_image else (np.repeat(np.arange(b), n), 1)
            self.image_loads.append(weight * _table(image, choice, chosen, (b, e)))
        expert, token = _numpy(routing.expert), _numpy(routing.token)  # (A,)
        self.assigned += np.bincount(expert, minlength=e)
        per_image_and_expert = np.bincount(token // n * e + expert, minlength=b * e)
        self.experts_of_images += int(np.count_nonzero(per_image_and_expert))
        self.weight += float(_numpy(routing.weight).sum(dtype=np.float64))
        self.entropy += float(entropy(probs).sum())
        self.decisions += len(probs)
        self.choices += int(chosen.sum()) * (n if per_image else 1)
        self.refused += int(_numpy(routing.dropped).sum())
        self.images += b

    def summary(self) -> dict[str, Any]:
        """The layer's row of a record's `moe` entry."""
        served = int(self.assigned.sum())
        return {
            "block": self.block,
            "load": load_share(self.assigned).tolist(),
            "entropy": self.entropy / self.decisions,
            "weight": self.weight / max(served, 1),
            "dropped": self.refused / max(self.choices, 1),
            "experts_per_image": self.experts_of_images / self.images,
        }


def _table(
    row: np.ndarray, choice: np.ndarray, chosen: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Counts (R, K) choices in a table of this shape, (rows, E); row: (R,) of each decision."""
    cell = row[:, None] * shape[1] + choice
    return np.bincount(cell[chosen], minlength=shape[0] * shape[1]).reshape(shape)


class RoutingProbe:
    """Accumulates the routing of an evaluation, layer by layer; sums only, so the cost does not
    grow with the test set.

    image_loads: also counts the tokens of each image; their table does grow with the test set.

    probe = RoutingProbe(num_classes)
    probe.update(tape.routings(), blocks, labels)   # per batch
    probe.summary(), probe.arrays()
    """

    def __init__(self, num_classes: int, image_loads: bool = False):
        self.classes, self.image_loads = num_classes, image_loads
        self._layers: list[_LayerCounts] = []

    def update(self, routings: Sequence[Routing], blocks: Sequence[int], labels: Any) -> None:
        """Takes in one batch.

        routings: one per MoE layer, shallow to deep; blocks: their 0-based block indices; labels:
        (B,) classes. Raises ValueError if labels do not fit the images or classes, or if layers,
        experts or tokens change between batches.
        """
        labels = np.asarray(_numpy(labels) if hasattr(labels, "detach") else labels).astype(
            np.int64
        )
        if len(routings) != len(blocks):
            raise ValueError(
                f"one block index per routing: got {len(routings)} routings and {len(blocks)} "
                "blocks"
            )
        if not routings:
            return
        if labels.shape != (routings[0].shape[0],):
            raise ValueError(
                f"labels have shape {labels.shape}, but the batch has {routings[0].shape[0]} images"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
            raise ValueError(
                f"labels span {labels.min()}..{labels.max()}, valid is 0..{self.classes - 1}: "
                f"make the probe with num_classes={labels.max() + 1} or map the labels"
            )
        if not self._layers:
            self._layers = [
                _LayerCounts(block, r.experts, r.shape[1], self.classes, self.image_loads)
                for r, block in zip(routings, blocks, strict=True)
            ]
        shapes = [(block, r.experts, r.shape[1]) for r, block in zip(routings, blocks, strict=True)]
        known = [(layer.block, layer.experts, layer.tokens) for layer in self._layers]
        if shapes != known:
            raise ValueError(
                f"layers changed between batches: (block, experts, tokens) was {known}, is "
                f"{shapes}; use a new RoutingProbe for another model or image size"
            )
        for layer, routing in zip(self._layers, routings, strict=True):
            layer.add(routing, labels)

    def summary(self) -> list[dict[str, Any]]:
        """Returns a row per layer: block, load (E shares of the served assignments), entropy (nats,
        mean over decisions), weight (mean gate weight of served assignments), dropped (share of
        choices refused), experts_per_image (mean number of distinct routed experts)."""
        return [layer.summary() for layer in self._layers]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns class_expert (M, C, E) and position_expert (M, N, E), int32 counts of choices
        before dropping.

        Image-level layers count images (times K), token-level layers tokens (times K); at image
        level all positions of an image are alike. Layers with fewer experts or tokens are padded
        with zeros to the largest. With image_loads also "image_loads", (I, M, E) uint16: the tokens
        (times K) of each image that chose each expert, at image level too. Raises OverflowError
        for counts beyond these types.
        """
        experts = max((layer.experts for layer in self._layers), default=0)
        tokens = max((layer.tokens for layer in self._layers), default=0)
        by_class = np.zeros((len(self._layers), self.classes, experts), np.int32)
        by_position = np.zeros((len(self._layers), tokens, experts), np.int32)
        most = np.iinfo(np.int32).max
        for i, layer in enumerate(self._layers):
            if max(layer.by_class.max(initial=0), layer.by_position.max(initial=0)) > most:
                raise OverflowError(
                    f"a count of block {layer.block} exceeds 2^31-1: evaluate on fewer images"
                )
            by_class[i, :, : layer.experts] = layer.by_class
            by_position[i, : layer.tokens, : layer.experts] = layer.by_position
        tables = {"class_expert": by_class, "position_expert": by_position}
        return tables | ({"image_loads": self._image_loads(experts)} if self.image_loads else {})

    def _image_loads(self, experts: int) -> np.ndarray:
        """Puts the image loads of all layers together, padded to the largest number of experts."""
        of_layers = [np.concatenate(layer.image_loads) for layer in self._layers]  # (I, E) each
        loads = np.zeros((len(of_layers[0]), len(of_layers), experts), np.uint16)
        for i, of_layer in enumerate(of_layers):
            if of_layer.max() > np.iinfo(np.uint16).max:
                raise OverflowError(
                    f"an image sends {of_layer.max()} tokens to one expert of block "
                    f"{self._layers[i].block}, more than 2^16-1: leave image_loads False"
                )
            loads[:, i, : of_layer.shape[1]] = of_layer
        return loads
