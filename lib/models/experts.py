"""Experts: E two-layer MLPs in stacked weights, and one forward that does no more work than its
assignments need.

Axis letters: **T** tokens, **R** rows that the experts compute (one for each assignment of a token
to an expert, and those that fill slices up), **D** width, **H** expert hidden width (it may differ
between experts), **E** experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routers.base import Routing
from . import grouped
from .grouped import GroupedProduct
from .mlps import GatedActivation, maps_of
from .rows import Rows, StackedProduct

# On CPU the library behind bfloat16 products builds a kernel for each new number of rows, which
# takes longer than the product. Slices whose lengths are multiples of 16 have few different numbers
# of rows; the rows that fill a slice up are copies of a token, and their results are not read.
ROWS_MULTIPLE = 16

# Up to this size the hidden activations of all rows are one tensor in a training step, and the
# gradients of weights need not be stacked: with 7 MB of them, at T = 1,088, a step was faster by 2
# to 6 % in float32 and by 5 to 12 % under autocast. With 25 MB, more than the caches hold, it was
# slower by 9 %.
TOGETHER_BYTES = 2**23


class Experts(nn.Module):
    """Holds E MLPs in stacked weights and applies each to the tokens that are assigned to it.

    Experts of equal hidden width are stacked: `fc1.weight` (E, H, D), `fc1.bias` (E, H),
    `fc2.weight` (E, D, H), `fc2.bias` (E, D).

    Experts of unequal hidden width lie one after the other: `fc1.weight` (sum H, D), `fc1.bias`
    (sum H,), `fc2.weight` (sum H, D), which is transposed so that an expert's slice is contiguous,
    `fc2.bias` (E, D), and a buffer `rows` (E,) with the widths, without which a saved state could
    not be split into experts again.

    Gated experts (SwiGLU and its like) have a `GatedActivation` as `act`, and `fc1` has 2 H rows an
    expert, those of the gate first.

    hidden: H, or one H an expert; equal ones are stacked. Raises ValueError if a width is below 1,
    if their number is not E, and if a state of other widths is loaded.

    The biases have names that end in `.bias`: timm's own rules go by that name or by the number of
    axes, and a stacked bias has two, so `training.optimiser` exempts it from weight decay by
    name. An expert that gets no token has a zero gradient, not none: AdamW still decays its weights
    and applies its momentum, as it does for every weight of a dense layer (tested).
    """

    def __init__(
        self, experts: int, width: int, hidden: int | Sequence[int], act: nn.Module | None = None
    ):
        super().__init__()
        widths = (hidden,) * experts if isinstance(hidden, int) else tuple(hidden)
        if len(widths) != experts or not widths:
            raise ValueError(
                f"hidden={widths} names {len(widths)} widths for experts={experts}: "
                "one width an expert, or one for all, and at least one expert"
            )
        if min(widths) < 1:
            raise ValueError(
                f"hidden={widths} leaves expert {widths.index(min(widths))} without a neuron: "
                "pruning to nothing is not pruning; keep at least 1, or drop the expert from the "
                "layer"
            )
        self.experts, self.width = experts, width
        self.hidden = widths if len(set(widths)) > 1 else widths[0]
        self.act = act if act is not None else nn.GELU()
        rows = self.rows_of_neuron
        if isinstance(self.hidden, int):
            self.fc1 = _StackedLinear(experts, rows * self.hidden, width)
            self.fc2 = _StackedLinear(experts, width, self.hidden)
            return
        self.fc1 = FlatLinear((rows * sum(widths), width), (rows * sum(widths),))
        self.fc2 = FlatLinear((sum(widths), width), (experts, width))
        # The device is named, so that a skeleton on the meta device keeps the values.
        self.register_buffer("rows", torch.tensor(widths, device="cpu"))
        # Each expert is drawn as nn.Linear draws it: within 1 / sqrt(number of inputs).
        with torch.no_grad():
            for h, (w1, b1, w2, b2) in zip(widths, self.each(), strict=True):
                for parameter, inputs in ((w1, width), (b1, width), (w2, h), (b2, h)):
                    parameter.uniform_(-(inputs**-0.5), inputs**-0.5)

    @classmethod
    def of(
        cls, parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], act: nn.Module | None = None
    ) -> Experts:
        """Makes experts of copies of the given weights.

        parts: of each expert w1 (H, D), b1 (H,), w2 (D, H), b2 (D,); gated: w1 (2 H, D), b1 (2 H,).
        Raises ValueError if the shapes of a part do not belong together, and as the class itself.
        """
        rows = 2 if isinstance(act, GatedActivation) else 1
        parts = [tuple(tensor.detach() for tensor in part) for part in parts]
        width = parts[0][3].shape[0] if parts else 0
        for e, (w1, b1, w2, b2) in enumerate(parts):
            h = w2.shape[-1]
            shapes = tuple(w1.shape), tuple(b1.shape), tuple(w2.shape), tuple(b2.shape)
            if shapes != ((rows * h, width), (rows * h,), (width, h), (width,)):
                raise ValueError(
                    f"expert {e} has w1 {tuple(w1.shape)}, b1 {tuple(b1.shape)}, "
                    f"w2 {tuple(w2.shape)}, b2 {tuple(b2.shape)}: "
                    f"with D={width} and its H={h} these must be (H, D), (H,), (D, H), (D,), and "
                    "2 H in the place of H in w1 and b1 where experts are gated"
                )
        # On the meta device nothing is initialised only to be overwritten at once, and nothing is
        # drawn from the global generator.
        with torch.device("meta"):
            out = cls(len(parts), width, [part[2].shape[1] for part in parts], act)
        w1, b1, w2, b2 = zip(*parts, strict=True)
        if isinstance(out.hidden, int):
            weights = [torch.stack(tensors) for tensors in (w1, b1, w2, b2)]
        else:
            w2_rows = torch.cat([w.t() for w in w2])
            weights = [torch.cat(w1), torch.cat(b1), w2_rows, torch.stack(b2)]
            out.rows = out.rows.to(b2[0].device)
        out.fc1.weight, out.fc1.bias, out.fc2.weight, out.fc2.bias = map(nn.Parameter, weights)
        return out

    @classmethod
    def copies(cls, mlp: nn.Module, experts: int) -> Experts:
        """Makes E copies of an MLP that `maps_of` knows (sparse upcycling, 2212.05055).

        A layer without a bias gets one of zeros; what is frozen stays so. Raises ValueError as
        `maps_of`.
        """
        maps = maps_of(mlp)
        w1, b1, w2, b2 = maps.weights()
        b1 = w1.new_zeros(len(w1)) if b1 is None else b1
        b2 = w2.new_zeros(len(w2)) if b2 is None else b2
        out = cls.of([(w1, b1, w2, b2)] * experts, maps.act)
        maps.freeze_alike(out.fc1, out.fc2)
        return out

    @property
    def gated(self) -> bool:
        """Says whether a neuron has a gate row beside its value row."""
        return isinstance(self.act, GatedActivation)

    @property
    def rows_of_neuron(self) -> int:
        """Counts the rows of fc1 that a neuron has."""
        return 2 if self.gated else 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Returns H of each expert."""
        return (self.hidden,) * self.experts if isinstance(self.hidden, int) else self.hidden

    @staticmethod
    def widths_in(state: Mapping[str, Tensor], prefix: str = "") -> tuple[int, ...] | None:
        """Reads H of each expert from the shapes in a state dict; None if it holds no experts.

        prefix: what the names of their parameters begin with.
        """
        weight, rows = state.get(f"{prefix}fc2.weight"), state.get(f"{prefix}rows")
        if weight is not None and weight.ndim == 3:
            return (weight.shape[2],) * weight.shape[0]
        return None if weight is None or rows is None else tuple(rows.tolist())

    def each(
        self, transform: Callable[[Tensor], Tensor] = lambda parameter: parameter
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yields w1 (H, D), b1 (H,), w2 (D, H), b2 (D,) of each expert, as views.

        Of gated ones w1 is (2 H, D) and b1 (2 H,), the gate's rows first.

        transform: what to do first with each whole parameter (cast it; put its gradient in its
        place); it returns a tensor of the same shape.
        """
        parameters = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        w1, b1, w2, b2 = map(transform, parameters)
        # Split once: with w[e] in a loop each backward step fills a gradient of all E experts with
        # zeros, which doubles its time at E = 32.
        if isinstance(self.hidden, int):
            return zip(w1.unbind(0), b1.unbind(0), w2.unbind(0), b2.unbind(0), strict=True)
        # from (H, D), as it is stored, to (D, H)
        w2_of_experts = [w.t() for w in w2.split(self.hidden)]
        rows = [self.rows_of_neuron * h for h in self.hidden]
        w1_of_experts, b1_of_experts = w1.split(rows), b1.split(rows)
        return zip(w1_of_experts, b1_of_experts, w2_of_experts, b2.unbind(0), strict=True)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws the weights of all experts anew, as timm's ViT draws its MLPs; biases are zero."""
        with torch.no_grad():
            w1, b1, w2, b2 = zip(*self.each(), strict=True)
            for weight in w1 + w2:
                nn.init.trunc_normal_(weight, std=0.02, generator=generator)
            for bias in b1 + b2:
                bias.zero_()

    def perturb(self, noise: float, generator: torch.Generator | None = None) -> None:
        """Adds normal noise to the weights of each expert, not to its biases.

        noise: standard deviation of the noise, in standard deviations of the matrix it is added to.
        """
        with torch.no_grad():
            for w1, _, w2, _ in self.each():
                for weight in (*w1.chunk(self.rows_of_neuron), w2):
                    # Drawn where the generator lies, usually on the CPU.
                    drawn = torch.empty(weight.shape).normal_(generator=generator)
                    weight.add_(noise * weight.std() * drawn.to(weight.device))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Computes for each token the weighted sum over its assignments, zero if it has none.

        x: (T, D). Returns (T, D), in the dtype of autocast where it is on.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rows = Rows.of(routing, len(x), ROWS_MULTIPLE if dtype == torch.bfloat16 else 1)
        inputs = rows.gather(x.to(dtype))  # (R, D), those of an expert are one slice
        run = self._rows_without_gradients
        if grouped.available(inputs, self.fc1.weight, self.fc2.weight):
            run = self._rows_in_groups
        elif torch.is_grad_enabled():
            run = self._rows_with_gradients
        return rows.sum_by_token(run(inputs, rows.lengths), routing.weight.to(dtype))

    def _rows_in_groups(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Computes the rows of all experts, (R, D) -> (R, D), in two products on a card."""
        expert = torch.arange(self.experts, device=x.device)
        sizes = torch.tensor(lengths, device=x.device)
        expert = expert.repeat_interleave(sizes, output_size=len(x))
        hidden = GroupedProduct.apply(x, self.fc1.weight, self.fc1.bias, expert)
        return GroupedProduct.apply(self.act(hidden), self.fc2.weight, self.fc2.bias, expert)

    def _rows_with_gradients(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Computes the rows of all experts, (R, D) -> (R, D), for a backward pass.

        A slice of no rows is computed as well: its empty products give the idle expert its zero
        gradient.
        """
        hidden_bytes = len(x) * self.rows_of_neuron * max(self.widths) * x.itemsize
        if self.fc1.weight.ndim == 3 and hidden_bytes <= TOGETHER_BYTES:
            hidden = StackedProduct.apply(x, self.fc1.weight, self.fc1.bias, lengths)
            return StackedProduct.apply(self.act(hidden), self.fc2.weight, self.fc2.bias, lengths)
        # Whole stacks are cast: autocast inside the loop would cast slice by slice and stack
        # float32 gradients once more.
        weights = self.each(lambda parameter: parameter.to(x.dtype))
        outputs = [
            F.linear(self.act(F.linear(rows, w1, b1)), w2, b2)
            for rows, (w1, b1, w2, b2) in zip(x.split(lengths), weights, strict=True)
        ]
        return torch.cat(outputs)

    def _rows_without_gradients(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Computes the same, where nothing is kept for a backward pass."""
        outputs = x.new_empty(len(x), self.width)
        write = self._write_weights_right
        if x.dtype == torch.bfloat16:
            write = self._write_weights_left
        parts = zip(x.split(lengths), self.each(), outputs.split(lengths), strict=True)
        for rows, weights, out in parts:
            # cast expert by expert: a product finds its weights in the processor's cache
            write(rows, *(weight.to(x.dtype) for weight in weights), out)
        return outputs

    def _write_weights_right(
        self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out: Tensor
    ) -> None:
        """Writes the outputs of one expert for its rows into `out`, without a copy."""
        torch.addmm(b2, self.act(F.linear(x, w1, b1)), w2.t(), out=out)

    def _write_weights_left(
        self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out: Tensor
    ) -> None:
        """Writes the same with the weights on the left of each product.

        In bfloat16 the right-hand side is packed anew for each product, and there are fewer rows
        than weights. With a backward pass nothing is gained by it.
        """
        rows = torch.addmm(b1.unsqueeze(1), w1, x.t())  # (H, T), gated (2 H, T)
        hidden = self.act(rows, 0) if self.gated else self.act(rows)
        out.copy_(torch.addmm(b2.unsqueeze(1), w2, hidden).t())

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        state_widths = self.widths_in(state_dict, prefix)
        if state_widths is not None and state_widths != self.widths:
            where = prefix.rstrip(".") or "the experts"
            raise ValueError(
                f"{where}: the state has {len(state_widths)} experts of widths {state_widths}, "
                f"the layer {self.experts} of {self.widths}: give the layer the widths of a pruned "
                "state first (pruning.neurons.removal.fit_shapes)"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, width={self.width}, hidden={self.hidden}"


class _StackedLinear(nn.Module):
    """Holds E linear maps, each drawn like `nn.Linear`: weight (E, out, in), bias (E, out)."""

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(
            torch.empty(experts, out_features, in_features).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(experts, out_features).uniform_(-bound, bound))


class FlatLinear(nn.Module):
    """Holds the parameters of E linear maps of unequal width, one after the other.

    `Experts` draws them and knows which rows belong to which expert.
    """

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...]):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(weight)), nn.Parameter(torch.empty(bias))
