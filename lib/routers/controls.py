"""Two controls of extraction: a router that chooses without looking, and one that looks at what it
saves.

Axis letters: **T** tokens, **D** width, **H** hidden width, **E** experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hard import HardRouter


class RandomRouter(HardRouter):
    """Draws experts without looking at the tokens: the control.

    The draw depends on the place in the batch alone, so that it repeats.
    """

    not_exported = "a RandomRouter draws from torch's generator, which no other runtime has"

    def scores(self, rows: Tensor) -> Tensor:
        """Draws (T, E) uniform scores for rows, (T, D)."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(len(rows), self.experts, generator=generator).to(rows.device)


class OracleRouter(HardRouter):
    """Chooses the cluster that a token's hidden activations are nearest to: the other control.

    It computes the whole dense first layer to find out, so it saves nothing. centres: (E, H);
    weight (H, D), bias (H,): of that layer.
    """

    def __init__(self, centres: Tensor, weight: Tensor, bias: Tensor, act: nn.Module):
        super().__init__(len(centres))
        for name, tensor in (("centres", centres), ("weight", weight), ("bias", bias)):
            self.register_buffer(name, tensor.detach().float().clone())
        self.act = act

    def settings(self) -> dict[str, Any]:
        """Counts experts, width and hidden width."""
        hidden, width = self.weight.shape
        return {"experts": self.experts, "width": width, "hidden": hidden}

    @classmethod
    def with_settings(cls, settings: Mapping[str, Any], act: nn.Module | None) -> Self:
        """Makes the router; its tensors come from a state."""
        experts, width, hidden = (settings[name] for name in ("experts", "width", "hidden"))
        weight = torch.empty(hidden, width)
        return cls(torch.empty(experts, hidden), weight, torch.empty(hidden), act)

    def scores(self, rows: Tensor) -> Tensor:
        """Scores the clusters for rows, (T, D): (T, E), largest for the nearest."""
        centres = self.centres.float()
        hidden = self.act(F.linear(rows, self.weight.float(), self.bias.float()))
        return F.linear(hidden, centres, -centres.square().sum(dim=1) / 2)
