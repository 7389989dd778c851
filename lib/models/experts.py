"""Experts: E two-layer MLPs in stacked weights, and one forward that does no more work than its
assignments need.

Axis letters: **T** tokens, **A** assignments, **D** width, **H** expert hidden width (of each
expert its own), **E** experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routers.base import Routing

# On CPU the library behind bfloat16 products builds a kernel for each new number of rows, which
# takes longer than the product. Slices of whole multiples meet few different numbers; the rows that
# fill them up are copies whose results nobody reads.
ALIGN = 16


class Experts(nn.Module):
    """Stacked MLPs: `fc1.weight` (E, H, D), `fc1.bias` (E, H), `fc2.weight` (E, D, H), `fc2.bias`
    (E, D).

    Experts of unequal hidden width lie one after the other: `fc1.weight` (sum H, D), `fc1.bias`
    (sum H,), `fc2.weight` (sum H, D), which is transposed so that an expert's slice is contiguous,
    `fc2.bias` (E, D), and a buffer `rows` (E,) with the widths, without which a saved state could
    not be cut again. hidden: H, or one H an expert; equal ones are stacked. Raises ValueError if a
    width is below 1, if their number is not E, and if a state of other widths is loaded.

    The biases carry names that end in `.bias`: timm's own rules go by that name or by the number of
    axes, and a stacked bias has two, so `train.optimiser` exempts it from weight decay by name. An
    expert that gets no token has a zero gradient, not none: AdamW still decays its weights and
    applies its momentum, as it does for every weight of a dense layer (tested).
    """

    def __init__(
        self, experts: int, width: int, hidden: int | Sequence[int], act: nn.Module | None = None
    ):
        super().__init__()
        widths = (hidden,) * experts if isinstance(hidden, int) else tuple(hidden)
        if len(widths) != experts or not widths:
            raise ValueError(
                f"hidden={widths} names {len(widths)} widths for experts={experts}: one width an "
                "expert, or one for "
                "all, and at least one expert"
            )
        if min(widths) < 1:
            raise ValueError(
                f"hidden={widths} leaves expert {widths.index(min(widths))} without a neuron: "
                "pruning to nothing "
                "is not pruning; keep at least 1, or drop the expert from the layer"
            )
        self.experts, self.width, self.hidden = (
            experts,
            width,
            widths if len(set(widths)) > 1 else widths[0],
        )
        self.act = act if act is not None else nn.GELU()
        if isinstance(self.hidden, int):
            self.fc1 = _Stack(experts, self.hidden, width)
            self.fc2 = _Stack(experts, width, self.hidden)
            return
        self.fc1 = Flat((sum(widths), width), (sum(widths),))
        self.fc2 = Flat((sum(widths), width), (experts, width))
        # The device is named, so that a skeleton on the meta device keeps the values.
        self.register_buffer("rows", torch.tensor(widths, device="cpu"))
        with torch.no_grad():
            for h, (w1, b1, w2, b2) in zip(widths, self.each(), strict=True):
                for part, inputs in ((w1, width), (b1, width), (w2, h), (b2, h)):
                    part.uniform_(-(inputs**-0.5), inputs**-0.5)

    @classmethod
    def of(
        cls, parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], act: nn.Module | None = None
    ) -> Experts:
        """Experts with copies of the given weights; parts: of each expert w1 (H, D), b1 (H,), w2
        (D, H), b2 (D,).

        ValueError if the shapes of a part do not belong together, and as the class itself.
        """
        parts = [tuple(tensor.detach() for tensor in part) for part in parts]
        width = parts[0][3].shape[0] if parts else 0
        for e, (w1, b1, w2, b2) in enumerate(parts):
            h = b1.shape[0]
            if (tuple(w1.shape), tuple(w2.shape), tuple(b2.shape)) != (
                (h, width),
                (width, h),
                (width,),
            ):
                raise ValueError(
                    f"expert {e} has w1 {tuple(w1.shape)}, b1 {tuple(b1.shape)}, w2 "
                    f"{tuple(w2.shape)}, b2 "
                    f"{tuple(b2.shape)}: with D={width} and its H={h} these must be (H, D), (H,), "
                    "(D, H), (D,)"
                )
        with torch.device(
            "meta"
        ):  # no initialisation that is overwritten at once, and no draw from the global generator
            out = cls(len(parts), width, [part[1].shape[0] for part in parts], act)
        w1, b1, w2, b2 = zip(*parts, strict=True)
        if isinstance(out.hidden, int):
            held = [torch.stack(group) for group in (w1, b1, w2, b2)]
        else:
            held = [torch.cat(w1), torch.cat(b1), torch.cat([w.t() for w in w2]), torch.stack(b2)]
            out.rows = out.rows.to(b2[0].device)
        (out.fc1.weight, out.fc1.bias, out.fc2.weight, out.fc2.bias) = map(nn.Parameter, held)
        return out

    @classmethod
    def copies(cls, mlp: nn.Module, experts: int) -> Experts:
        """E copies of a timm `Mlp` with Linear fc1 and fc2 (sparse upcycling, 2212.05055)."""
        biases = [
            fc.weight.new_zeros(fc.out_features) if fc.bias is None else fc.bias
            for fc in (mlp.fc1, mlp.fc2)
        ]
        return cls.of([(mlp.fc1.weight, biases[0], mlp.fc2.weight, biases[1])] * experts, mlp.act)

    @property
    def widths(self) -> tuple[int, ...]:
        """H of each expert."""
        return (self.hidden,) * self.experts if isinstance(self.hidden, int) else self.hidden

    @staticmethod
    def widths_in(state: Mapping[str, Tensor], prefix: str = "") -> tuple[int, ...] | None:
        """H of each expert whose weights lie under `prefix` in a state dict; None if no experts "
        "do."""
        weight, rows = state.get(f"{prefix}fc1.weight"), state.get(f"{prefix}rows")
        if weight is not None and weight.ndim == 3:
            return (weight.shape[1],) * weight.shape[0]
        return None if weight is None or rows is None else tuple(rows.tolist())

    def each(
        self, turn: Callable[[Tensor], Tensor] = lambda held: held
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """w1 (H, D), b1 (H,), w2 (D, H), b2 (D,) of each expert, as views. turn: what to do first
        with each whole parameter (cast it; put its gradient in its place), a tensor of the same
        shape."""
        w1, b1, w2, b2 = map(turn, (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias))
        # Cut once: indexing w[e] in a loop gives each backward step an E-fold zero-filled gradient
        # (2x at E = 32).
        if isinstance(self.hidden, int):
            return zip(w1.unbind(0), b1.unbind(0), w2.unbind(0), b2.unbind(0), strict=True)
        turned = [w.t() for w in w2.split(self.hidden)]
        return zip(w1.split(self.hidden), b1.split(self.hidden), turned, b2.unbind(0), strict=True)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw all experts anew, each for itself, as timm's ViT draws its MLPs."""
        with torch.no_grad():
            w1, b1, w2, b2 = zip(*self.each(), strict=True)
            for weight in w1 + w2:
                nn.init.trunc_normal_(weight, std=0.02, generator=generator)
            for bias in b1 + b2:
                bias.zero_()

    def perturb(self, noise: float, generator: torch.Generator | None = None) -> None:
        """Add normal noise to the weights, not the biases, in standard deviations of each expert's
        matrix."""
        with torch.no_grad():
            for w1, _, w2, _ in self.each():
                for weight in (w1, w2):
                    drawn = torch.empty(weight.shape).normal_(
                        generator=generator
                    )  # where the generator lies, usually the CPU
                    weight.add_(noise * weight.std() * drawn.to(weight.device))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x: (T, D); returns (T, D): for each token the weighted sum over its assignments, zero if
        it has none."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        order = torch.argsort(routing.expert, stable=True)
        token, counts = routing.token[order], routing.load()
        low = dtype == torch.bfloat16
        slices, place = _aligned(counts, ALIGN if low else 1)
        source = token.new_zeros(sum(slices)).index_copy(0, place, token)
        rows = x.to(dtype).index_select(0, source).split(slices)
        # Cast whole stacks: autocast inside the loop would cast slice by slice and stack float32
        # gradients once more.
        weights = self.each(lambda held: held.to(dtype))
        if torch.is_grad_enabled():
            # A zero-row slice still runs: its empty products give the idle expert its zero
            # gradient.
            done = torch.cat(
                [
                    F.linear(self.act(F.linear(part, w1, b1)), w2, b2)
                    for part, (w1, b1, w2, b2) in zip(rows, weights, strict=True)
                ]
            )
        else:
            done = rows[0].new_empty(sum(slices), x.shape[1])
            for part, own, out in zip(rows, weights, done.split(slices), strict=True):
                (self._left if low else self._right)(part, *own, out)
        return _sum_by_token(done, place, token, routing.weight[order].to(dtype), x.shape[0])

    def _right(
        self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out: Tensor
    ) -> None:
        torch.addmm(b2, self.act(F.linear(x, w1, b1)), w2.t(), out=out)

    def _left(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out: Tensor) -> None:
        """The same with the weights on the left of each product: the right-hand side is what gets
        packed in bfloat16, and there are fewer rows than weights. With a backward pass nothing is
        gained by it."""
        out.copy_(
            torch.addmm(b2.unsqueeze(1), w2, self.act(torch.addmm(b1.unsqueeze(1), w1, x.t()))).t()
        )

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        theirs = self.widths_in(state_dict, prefix)
        if theirs is not None and theirs != self.widths:
            where = prefix.rstrip(".") or "the experts"
            raise ValueError(
                f"{where}: the state has {len(theirs)} experts of widths {theirs}, the layer "
                f"{self.experts} of "
                f"{self.widths}: cut the layer to a pruned state's widths first "
                "(pruning.neurons.removal.fit_shapes)"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, width={self.width}, hidden={self.hidden}"


class _Stack(nn.Module):
    """E linear maps: weight (E, out, in), bias (E, out), each initialised like `nn.Linear`."""

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(
            torch.empty(experts, out_features, in_features).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(experts, out_features).uniform_(-bound, bound))


class Flat(nn.Module):
    """Parameters of E maps of unequal width side by side; `Experts` draws them and knows whose rows
    are whose."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...]):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(weight)), nn.Parameter(torch.empty(bias))


def _aligned(counts: Tensor, step: int) -> tuple[list[int], Tensor]:
    """Slice lengths for (E,) counts, rounded up to multiples of `step`, and the (A,) places of the
    real rows in them."""
    slices = -(-counts // step) * step
    shift = (slices - counts).cumsum(0) - (slices - counts)
    place = torch.arange(int(counts.sum()), device=counts.device) + shift.repeat_interleave(counts)
    return slices.tolist(), place


def _sum_by_token(
    rows: Tensor, place: Tensor, token: Tensor, weight: Tensor, tokens: int
) -> Tensor:
    """rows: (S, D) of which the (A,) `place` are real, token: (A,) their tokens, weight: (A,) their
    factors; returns the (T, D) weighted sums, zero for a token without rows."""
    by_token = torch.argsort(token, stable=True)
    each, rest = divmod(token.numel(), max(tokens, 1))
    in_turn = torch.arange(tokens, device=token.device).repeat_interleave(each)
    complete = not rest and torch.equal(
        token[by_token], in_turn
    )  # nothing dropped, everybody has as many
    if complete:
        place, weight = place[by_token], weight[by_token]
    rows = rows.index_select(0, place)
    if (
        weight.requires_grad or not (weight == 1).all()
    ):  # a hard decision saves a pass over all rows
        rows = rows * weight.unsqueeze(1)
    if not complete:
        return rows.new_zeros(tokens, rows.shape[1]).index_add(0, token, rows)
    # A short sum, since index_add walks row by row on CPU.
    return (
        rows if each == 1 else rows.view(tokens, each, rows.shape[1]).sum(dim=1, dtype=rows.dtype)
    )
