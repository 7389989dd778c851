"""A small trained network that predicts which experts respond (MoEfication, 2110.01786).

Axis letters: **T** tokens, **D** width, **E** experts, **K** experts per token.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .hard import HardRouter


class PredictorRouter(HardRouter):
    """Predicts which groups of neurons respond, by two linear maps with tanh between
    (MoEfication)."""

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__(experts, top_k)
        self.fc1, self.fc2 = nn.Linear(width, experts), nn.Linear(experts, experts)

    @property
    def width(self) -> int:
        """Returns D."""
        return self.fc1.in_features

    def scores(self, rows: Tensor) -> Tensor:
        """Predicts the responses to rows, (T, D): (T, E)."""
        hidden = F.linear(rows, self.fc1.weight.float(), self.fc1.bias.float()).tanh()
        return F.linear(hidden, self.fc2.weight.float(), self.fc2.bias.float())
