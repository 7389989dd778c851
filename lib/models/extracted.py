"""Routers and storage of experts that were cut out of a trained MLP (MoEE, 2505.15414; MoEfication, 2110.01786).

Decisions are hard and no gate weighs an output: experts were parts of a whole that was not weighed either.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **H** hidden width (of each expert its own), **U**
neurons in any expert, **E** experts, **K** experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import Experts, Flat
from .routing import Routing, assign


class HardRouter(nn.Module, ABC):
    """The K experts with the largest scores, with weight 1. Subclasses give `scores`."""

    def __init__(self, experts: int, top_k: int = 1):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} of {experts} experts: valid is 1 to {experts}")
        self.experts, self.top_k = experts, top_k

    @abstractmethod
    def scores(self, rows: Tensor) -> Tensor:
        """rows: (T, D), float32 -> (T, E), float32, whatever the number type of the weights: close decisions would flip."""

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) -> a Routing whose probabilities are 1/K for the chosen experts and 0 for the others."""
        b, n, d = x.shape
        with torch.autocast(x.device.type, enabled=False):
            logits = self.scores(x.reshape(b * n, d).float())
        choice = logits.topk(self.top_k, dim=-1).indices
        probs = torch.zeros_like(logits).scatter(1, choice, 1 / self.top_k)
        return assign(choice, torch.ones_like(choice, dtype=logits.dtype), probs, logits, (b, n))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top_k={self.top_k}"


class CentroidRouter(HardRouter):
    """The expert whose centre is nearest: weight (E, D) and bias (E,) are buffers, so no finetuning moves them.

    All three measures order experts by a linear function of the token, since its own norm does not change the order.
    """

    def __init__(self, weight: Tensor, bias: Tensor, top_k: int = 1):
        super().__init__(len(weight), top_k)
        self.register_buffer("weight", weight.detach().float().clone())
        self.register_buffer("bias", bias.detach().float().clone())

    @classmethod
    def of(cls, means: Tensor, measure: str = "cosine", centre: Tensor | None = None, top_k: int = 1) -> CentroidRouter:
        """means: (E, D) mean inputs of the clusters. measure: "cosine", as in MoEE; "centred", the cosine after `centre` (D,),
        the mean of all tokens, was taken from both; "nearest", Euclidean. ValueError for another one."""
        if measure == "nearest":
            return cls(means, -means.square().sum(dim=1) / 2, top_k)
        if measure not in ("cosine", "centred"):
            raise ValueError(f"measure={measure!r} is unknown: valid are cosine, centred and nearest")
        centre = torch.zeros_like(means[0]) if measure == "cosine" else centre
        unit = F.normalize(means - centre, dim=1)
        return cls(unit, -unit @ centre, top_k)

    def scores(self, rows: Tensor) -> Tensor:
        """rows: (T, D) -> (T, E)."""
        return F.linear(rows, self.weight.float(), self.bias.float())


class PredictorRouter(HardRouter):
    """Two linear maps with tanh between, trained to predict which groups of neurons respond (MoEfication)."""

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__(experts, top_k)
        self.fc1, self.fc2 = nn.Linear(width, experts), nn.Linear(experts, experts)

    def scores(self, rows: Tensor) -> Tensor:
        """rows: (T, D) -> (T, E)."""
        hidden = F.linear(rows, self.fc1.weight.float(), self.fc1.bias.float()).tanh()
        return F.linear(hidden, self.fc2.weight.float(), self.fc2.bias.float())


class RandomRouter(HardRouter):
    """Experts drawn without looking, the control. The draw depends on the place in the batch alone, so that it repeats."""

    def scores(self, rows: Tensor) -> Tensor:
        """rows: (T, D) -> (T, E)."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(len(rows), self.experts, generator=generator).to(rows.device)


class OracleRouter(HardRouter):
    """The control at the other end: the cluster that the token's hidden activations are nearest to. It computes the whole dense
    layer to find out, so it saves nothing. centres: (E, H); weight (H, D), bias (H,): of the dense first layer."""

    def __init__(self, centres: Tensor, weight: Tensor, bias: Tensor, act: nn.Module):
        super().__init__(len(centres))
        for name, held in (("centres", centres), ("weight", weight), ("bias", bias)):
            self.register_buffer(name, held.detach().float().clone())
        self.act = act

    def scores(self, rows: Tensor) -> Tensor:
        """rows: (T, D) -> (T, E)."""
        centres = self.centres.float()
        hidden = self.act(F.linear(rows, self.weight.float(), self.bias.float()))
        return F.linear(hidden, centres, -centres.square().sum(dim=1) / 2)


class SharedExperts(Experts):
    """Experts as sets of neurons of one store: less memory where they overlap, and a gather of weights in each forward.

    `fc1.weight` (U, D), `fc1.bias` (U,), `fc2.weight` (U, D), transposed, `fc2.bias` (E, D), buffers `index` (sum H,) with the
    experts' neurons one after the other and `rows` (E,) with how many each has. Every expert's second map is cut from the one
    matrix, so they differ by bias alone; unless second maps of their own are given: then `fc2.weight` is (sum H, D).

    store: w1 (U, D), b1 (U,), w2 (D, U), or in its place of each expert its own w2 (D, H).
    """

    def __init__(self, store: tuple[Tensor, Tensor, Tensor | Sequence[Tensor]], sets: Sequence[Tensor], biases: Tensor,
                 act: nn.Module | None = None):
        nn.Module.__init__(self)
        w1, b1, w2 = store
        self.own = not isinstance(w2, Tensor)
        w2 = torch.cat(list(w2), dim=1) if self.own else w2
        self.experts, self.width = len(sets), w1.shape[1]
        self._widths = tuple(map(len, sets))
        self.hidden = self._widths if len(set(self._widths)) > 1 else self._widths[0]
        self.act = act if act is not None else nn.GELU()
        with torch.device("meta"):
            self.fc1, self.fc2 = Flat(tuple(w1.shape), tuple(b1.shape)), Flat(tuple(w2.t().shape), tuple(biases.shape))
        held = (w1, b1, w2.t(), biases)
        parts = (nn.Parameter(tensor.detach().clone().contiguous()) for tensor in held)
        self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias = parts
        self.register_buffer("index", torch.cat([torch.as_tensor(s) for s in sets]))
        self.register_buffer("rows", torch.tensor(self._widths))

    @property
    def widths(self) -> tuple[int, ...]:
        """H of each expert."""
        return self._widths

    def each(self, turn: Callable[[Tensor], Tensor] = lambda held: held) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """w1 (H, D), b1 (H,), w2 (D, H), b2 (D,) of each expert, gathered from the store."""
        w1, b1, w2, b2 = map(turn, (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias))
        sets = self.index.split(self._widths)
        second = w2.split(self._widths) if self.own else (w2[s] for s in sets)
        return ((w1[s], b1[s], w.t(), b) for s, w, b in zip(sets, second, b2.unbind(0), strict=True))

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
