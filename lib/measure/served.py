"""What the experts of a model served: what its cost needs and only data decide.

Axis letters: **B** images, **T** tokens of all images, **E** experts, **K** experts per token,
**A** assignments, **R** decisions of a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..models.moe import MoELayer
from ..models.pruned import PrunedLayer
from ..routers.base import Routing


class ServedExperts:
    """Sums up the routings of the MoE layers of a model, batch by batch.

    served = ServedExperts(tape.layers)
    served.update(tape.routings(), len(images))   # per batch
    count(model, image_size, **served.measured())

    layers: shallow to deep, as the routings.
    """

    def __init__(self, layers: Sequence[MoELayer]):
        self._layers, self._images = list(layers), 0
        self._load = [0] * len(self._layers)  # (E,) assignments, of each layer
        # of each layer the choices, those that no expert computed, and experts summed over images
        self._sums = torch.zeros(len(self._layers), 3, dtype=torch.int64)

    def update(self, routings: Sequence[Routing], images: int) -> None:
        """Takes in a batch of so many images, whose tokens come image by image."""
        self._images += images
        for i, routing in enumerate(routings):
            # a layer may see windows of an image as if they were images
            tokens_of_image = len(routing.dropped) // images
            image_and_expert = routing.token // tokens_of_image * routing.experts + routing.expert
            tokens_of_decision = len(routing.dropped) // len(routing.probs)
            choices = (routing.choice >= 0).sum() * tokens_of_decision
            self._load[i] = self._load[i] + routing.load().cpu()
            self._sums[i] += torch.tensor(
                [choices, routing.dropped.sum(), image_and_expert.unique().numel()]
            )

    def measured(self) -> dict[str, Any]:
        """Returns what `cost.count` takes by these names: experts_per_image, loads, unserved.

        Loads are those of experts of unequal width alone.
        """
        shared = sum(layer.shared is not None for layer in self._layers)
        choices, refused, touched = self._sums.double().unbind(1)
        return {
            "experts_per_image": float((touched / self._images).sum()) + shared,
            "loads": [self._load_of(i) for i in range(len(self._layers))],
            "unserved": (refused / choices.clamp(min=1)).tolist(),
        }

    def _load_of(self, layer: int) -> list[float] | None:
        """Returns the share of the assignments of each expert, (E,)."""
        experts, load = self._layers[layer].experts, self._load[layer]
        if len(set(getattr(experts, "widths", ()))) < 2 or not load.sum():
            return None
        if isinstance(self._layers[layer], PrunedLayer):  # it numbers experts that are gone, too
            load = load[self._layers[layer].kept.cpu()]
        return (load / load.sum()).tolist()
