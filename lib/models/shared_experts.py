"""Experts as sets of neurons of one common store of weights.

Axis letters: **D** width, **H** hidden width (of each expert its own), **U** neurons in any expert,
**E** experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .experts import Experts, Flat


class SharedExperts(Experts):
    """Experts as sets of neurons of one store: less memory where they overlap, and a gather of
    weights in each forward.

    `fc1.weight` (U, D), `fc1.bias` (U,), `fc2.weight` (U, D), transposed, `fc2.bias` (E, D),
    buffers `index` (sum H,) with the experts' neurons one after the other and `rows` (E,) with how
    many each has. Every expert's second map is cut from the one matrix, so they differ by bias
    alone; unless second maps of their own are given: then `fc2.weight` is (sum H, D).

    store: w1 (U, D), b1 (U,), w2 (D, U), or in its place of each expert its own w2 (D, H).
    """

    def __init__(
        self,
        store: tuple[Tensor, Tensor, Tensor | Sequence[Tensor]],
        sets: Sequence[Tensor],
        biases: Tensor,
        act: nn.Module | None = None,
    ):
        nn.Module.__init__(self)
        w1, b1, w2 = store
        self.own = not isinstance(w2, Tensor)
        w2 = torch.cat(list(w2), dim=1) if self.own else w2
        self.experts, self.width = len(sets), w1.shape[1]
        self._widths = tuple(map(len, sets))
        self.hidden = self._widths if len(set(self._widths)) > 1 else self._widths[0]
        self.act = act if act is not None else nn.GELU()
        with torch.device("meta"):
            self.fc1, self.fc2 = (
                Flat(tuple(w1.shape), tuple(b1.shape)),
                Flat(tuple(w2.t().shape), tuple(biases.shape)),
            )
        held = (w1, b1, w2.t(), biases)
        parts = (nn.Parameter(tensor.detach().clone().contiguous()) for tensor in held)
        self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias = parts
        self.register_buffer("index", torch.cat([torch.as_tensor(s) for s in sets]))
        self.register_buffer("rows", torch.tensor(self._widths))

    @property
    def widths(self) -> tuple[int, ...]:
        """H of each expert."""
        return self._widths

    def each(
        self, turn: Callable[[Tensor], Tensor] = lambda held: held
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """w1 (H, D), b1 (H,), w2 (D, H), b2 (D,) of each expert, gathered from the store."""
        w1, b1, w2, b2 = map(turn, (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias))
        sets = self.index.split(self._widths)
        second = w2.split(self._widths) if self.own else (w2[s] for s in sets)
        return (
            (w1[s], b1[s], w.t(), b) for s, w, b in zip(sets, second, b2.unbind(0), strict=True)
        )

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
