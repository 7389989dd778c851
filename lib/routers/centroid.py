"""Routes a token to the expert whose cluster centre is nearest (MoEE, 2505.15414).

Axis letters: **T** tokens, **D** width, **E** experts, **K** experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hard import HardRouter


class CentroidRouter(HardRouter):
    """Chooses the experts whose centres are nearest.

    weight (E, D) and bias (E,) are buffers, so no finetuning moves them. All three measures order
    experts by a linear function of the token, since its own norm does not change the order.
    """

    def __init__(self, weight: Tensor, bias: Tensor, top_k: int = 1):
        super().__init__(len(weight), top_k)
        self.register_buffer("weight", weight.detach().float().clone())
        self.register_buffer("bias", bias.detach().float().clone())

    @classmethod
    def of(
        cls, means: Tensor, measure: str = "cosine", centre: Tensor | None = None, top_k: int = 1
    ) -> CentroidRouter:
        """Makes the router of clusters whose mean inputs are means, (E, D).

        measure: "cosine", as in MoEE; "centred", the cosine after `centre` (D,), the mean of all
        tokens, was taken from both; "nearest", Euclidean. Raises ValueError for another one.
        """
        if measure == "nearest":
            return cls(means, -means.square().sum(dim=1) / 2, top_k)
        if measure not in ("cosine", "centred"):
            raise ValueError(
                f"measure={measure!r} is unknown: valid are cosine, centred and nearest"
            )
        centre = torch.zeros_like(means[0]) if measure == "cosine" else centre
        unit = F.normalize(means - centre, dim=1)
        return cls(unit, -unit @ centre, top_k)

    def settings(self) -> dict[str, Any]:
        """Counts experts, width and K."""
        experts, width = self.weight.shape
        return {"experts": experts, "width": width, "top_k": self.top_k}

    @classmethod
    def with_settings(cls, settings: Mapping[str, Any], act: nn.Module | None) -> Self:
        """Makes the router; the centres come from a state."""
        experts = settings["experts"]
        weight = torch.empty(experts, settings["width"])
        return cls(weight, torch.empty(experts), settings["top_k"])

    def scores(self, rows: Tensor) -> Tensor:
        """Scores the centres for rows, (T, D): (T, E), largest for the nearest."""
        return F.linear(rows, self.weight.float(), self.bias.float())
