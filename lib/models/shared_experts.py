"""Experts as sets of neurons of one common store of weights.

Axis letters: **D** width, **H** hidden width of an expert (it may differ between experts), **U**
neurons of the store, **E** experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .experts import Experts, FlatLinear
from .mlps import rows_of_neurons


class SharedExperts(Experts):
    """Holds experts as sets of neurons of one store.

    It takes less memory where the sets overlap, and gathers weights in each forward.

    `fc1.weight` (U, D), `fc1.bias` (U,), `fc2.bias` (E, D); buffers `index` (sum H,) with the
    experts' neurons one after the other and `rows` (E,) with how many each has. `fc2.weight` is
    transposed. It is (U, D) where experts differ by neurons and bias alone, and (sum H, D) where
    each has output weights of its own.

    store: w1 (U, D), b1 (U,), and w2: (D, U), or of each expert (D, H); gated: w1 (2 U, D) and b1
    (2 U,), the gate's rows first. sets: of each expert the
    indices (H,) of its neurons in the store. biases: (E, D).
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
        self.own_output_weights = not isinstance(w2, Tensor)
        if self.own_output_weights:
            w2 = torch.cat(list(w2), dim=1)
        self.experts, self.width = len(sets), w1.shape[1]
        widths = tuple(map(len, sets))
        self.hidden = widths if len(set(widths)) > 1 else widths[0]
        self.act = act if act is not None else nn.GELU()
        # On the meta device no memory is taken: the parameters are replaced at once.
        with torch.device("meta"):
            self.fc1 = FlatLinear(tuple(w1.shape), tuple(b1.shape))
            self.fc2 = FlatLinear(tuple(w2.t().shape), tuple(biases.shape))
        parameters = (
            nn.Parameter(tensor.detach().clone().contiguous())
            for tensor in (w1, b1, w2.t(), biases)
        )
        self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias = parameters
        self.register_buffer("index", torch.cat([torch.as_tensor(neurons) for neurons in sets]))
        self.register_buffer("rows", torch.tensor(widths))

    def each(
        self, transform: Callable[[Tensor], Tensor] = lambda parameter: parameter
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yields w1 (H, D), b1 (H,), w2 (D, H), b2 (D,) of each expert, gathered from the store.

        transform: what to do first with each whole parameter, as in `Experts.each`.
        """
        parameters = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        w1, b1, w2, b2 = map(transform, parameters)
        sets, stored = self.index.split(self.widths), len(b1) // self.rows_of_neuron
        if self.own_output_weights:
            output_weights = w2.split(self.widths)
        else:
            output_weights = (w2[neurons] for neurons in sets)
        for neurons, w2_rows, bias in zip(sets, output_weights, b2.unbind(0), strict=True):
            rows = rows_of_neurons(neurons, stored, self.gated)
            yield w1[rows], b1[rows], w2_rows.t(), bias

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        # Skips the check of `Experts` for equal widths: here the buffers `index` and `rows`, which
        # are loaded with the state, decide them.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
