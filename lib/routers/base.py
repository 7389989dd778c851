"""Routers: who goes where. Every strategy ends in one `Routing`; no router touches expert weights.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **K**
experts per token, **A** assignments (T*K minus what was dropped), **R** rows that are decided on:
T, or B if one decision serves a whole image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import MoESpec

# A gate is divided by a sum of gates down to here. Its quotient is exact in float32 still further
# down, but the gradient is divided by the sum, too, and must not overflow on its way.
LEAST_SUM = 2.0**-100


@dataclass(frozen=True)
class Routing:
    """Holds what a router decided, and nothing else. Tensors are live: losses differentiate them.

    token: (A,) row of the (T, D) input; expert: (A,) its expert; weight: (A,) factor on the
    expert's output. probs: (R, E) router probabilities and logits: (R, E). choice: (R, K) chosen
    experts before any dropping, best first; -1 where a token has fewer (expert choice). dropped:
    (T,) number of refused choices of a token.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    probs: Tensor
    logits: Tensor
    choice: Tensor
    dropped: Tensor
    shape: tuple[int, int]  # (B, N)

    @property
    def experts(self) -> int:
        """Counts the experts, E."""
        return self.probs.shape[-1]

    @property
    def per_image(self) -> bool:
        """Says whether one decision serves all tokens of an image."""
        return self.probs.shape[0] == self.shape[0] and self.shape[1] > 1

    def load(self) -> Tensor:
        """Counts the assignments that each expert got, (E,)."""
        return torch.bincount(self.expert, minlength=self.experts)

    def token_choice(self) -> Tensor:
        """Gives each token its chosen experts, best first: (B, N, K).

        A decision on a whole image is repeated over its tokens.
        """
        b, n = self.shape
        k = self.choice.shape[-1]
        if self.per_image:
            return self.choice.view(b, 1, k).expand(b, n, k)
        return self.choice.view(b, n, k)


class Scores(NamedTuple):
    """Holds what a linear router thinks of the experts, (R, E) each: probabilities, their softmax
    of `deciding`, and logits, which are these without noise."""

    probs: Tensor
    logits: Tensor
    deciding: Tensor


class Router(nn.Module, ABC):
    """Decides which tokens go to which experts: the contract that every router fulfils.

    Nothing outside this room asks which router it has. A router that a spec can name has a line in
    `lib.spec.ROUTERS`, a line in `lib.routers.ROUTER_CLASSES`, and `from_spec`; the others are made
    by what needs them (extraction, dropping of experts, scores).
    """

    # True: experts get mixtures of tokens, so no token can be sent to an expert
    mixes_tokens: ClassVar[bool] = False
    # why a layer with this router has no form for other runtimes; None: it has
    not_exported: ClassVar[str | None] = None

    def __init__(self, experts: int):
        super().__init__()
        self.experts = experts

    @classmethod
    def from_spec(cls, spec: MoESpec, width: int, generator: torch.Generator | None) -> Self:
        """Makes the router of an MoE layer of this width, drawn where the generator lies.

        generator: None is the global one. Raises TypeError for a router that no spec can name.
        """
        raise TypeError(f"{cls.__name__} is not made from a MoESpec: call the class itself")

    @abstractmethod
    def forward(self, x: Tensor) -> Routing:
        """Decides on x, (B, N, D), the normed input of the MLP."""

    # ---- the ledger of costs

    @abstractmethod
    def expert_rows(self, tokens: int, images: int) -> int:
        """Counts the rows that all experts together compute for so many tokens of so many images,
        as if no capacity refused any."""

    @abstractmethod
    def experts_per_image(self) -> float | None:
        """Counts the experts that one image touches; None where only data decide."""

    @abstractmethod
    def decision_macs(self, tokens: int, images: int) -> int:
        """Counts the multiply-adds of the decisions on so many tokens of so many images."""

    def stored_numbers(self) -> int:
        """Counts the weights of the router: its parameters, and buffers that are weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    # ---- weights and experts

    def reset(self, generator: torch.Generator | None = None) -> None:  # noqa: B027
        """Draws anew what training starts from; does nothing in a router without such weights."""

    def taken_over(self, parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Completes the state of a parent's router, of any strategy, to a state of this one.

        What both have comes from the parent; what only the parent has is left out.
        """
        mine = self.state_dict()
        return {name: parent.get(name, tensor) for name, tensor in mine.items()}

    # ---- a file that says which router it holds

    def settings(self) -> dict[str, Any]:
        """Returns what the class is called with to make such a router, in numbers and words.

        Weights are no settings. Raises ValueError if the router does not keep what its constructor
        takes, under the same names.
        """
        names = arguments_of(type(self)) - {"generator"}
        if absent := [name for name in names if not hasattr(self, name)]:
            raise ValueError(
                f"a {type(self).__name__} cannot be described: its constructor takes "
                f"{', '.join(sorted(absent))}, which it does not keep under that name: give the "
                "class `settings` and `with_settings` of its own"
            )
        return {name: getattr(self, name) for name in sorted(names)}

    @classmethod
    def with_settings(cls, settings: Mapping[str, Any], act: nn.Module | None) -> Self:
        """Makes the router that `settings` describe; its weights come from a state.

        act: activation of the MLP in whose place the layer stands.
        """
        return cls(**settings)

    def serve(
        self, experts: Callable[[Tensor, Routing], Tensor], rows: Tensor, routing: Routing
    ) -> Tensor:
        """Carries out a Routing of this router: rows, (T, D) -> outputs of the experts, (T, D)."""
        return experts(rows, routing)

    # ---- the same by operations of fixed shapes, which exporters can follow

    def factors(self, x: Tensor) -> Tensor:
        """Gives every token of x, (B, N, D), its factor on the output of every expert: (T, E), 0
        where it does not go.

        No shape may depend on data.
        """
        routing = self(x)
        blank = routing.weight.new_zeros(x.shape[0] * x.shape[1], self.experts)
        return blank.index_put((routing.token, routing.expert), routing.weight, accumulate=True)

    def serve_all(self, experts: Sequence[Callable[[Tensor], Tensor] | None], x: Tensor) -> Tensor:
        """Sums the outputs of all experts on all tokens of x, (B, N, D), by `factors`: (T, D).

        experts: each maps rows to rows; None where an expert was dropped.
        """
        rows, factors = x.reshape(-1, x.shape[-1]), self.factors(x).to(x.dtype)
        out = torch.zeros_like(rows)
        for expert, factor in zip(experts, factors.unbind(1), strict=True):
            if expert is not None:
                out = out + expert(rows) * factor.unsqueeze(1)
        return out


def arguments_of(router: type[Router]) -> set[str]:
    """Names what the constructor of a router takes, and of its parent where it hands options on."""
    names: set[str] = set()
    for kind in router.__mro__:
        parameters = signature(kind).parameters.values()
        options = {
            parameter.name for parameter in parameters if parameter.kind == Parameter.VAR_KEYWORD
        }
        names |= {parameter.name for parameter in parameters} - options
        if not options:
            break
    return names


class LinearRouter(Router):
    """Holds what linear routers share: a weight (E, D), float32 logits, softmax over experts.

    noise: std of normal logit noise in training, in units of 1/E (V-MoE uses 1). std: of the normal
    initialisation.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        noise: float = 0.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ):
        super().__init__(experts)
        self.noise, self.std = noise, std
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset(generator)

    @property
    def width(self) -> int:
        """Returns D."""
        return self.weight.shape[1]

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws the weight anew, normal with `std`; zeros leave ties, which `topk` breaks in
        an order of its own, so that one expert gets all."""
        if self.std:
            self.weight.normal_(0.0, self.std, generator=generator)
        else:
            self.weight.zero_()

    def scores(self, rows: Tensor) -> Scores:
        """Scores the experts for rows, (R, D).

        Noise, which is for training, is not in the logits. Experts that a row cannot reach get
        probability 0.
        """
        # Router arithmetic stays in float32 under autocast: bf16 logits flip close decisions
        # (Switch, section 2.4).
        with torch.autocast(rows.device.type, enabled=False):
            logits = rows.float() @ self.weight.float().t()
        reachable = self.reachable(rows.shape[0])
        noisy_logits = logits
        if self.training and self.noise:
            count = self.experts if reachable is None else reachable.sum(dim=-1, keepdim=True)
            noisy_logits = logits + torch.randn_like(logits) * (self.noise / count)
        if reachable is not None:
            noisy_logits = noisy_logits.masked_fill(~reachable, -torch.inf)
            logits = logits.masked_fill(~reachable, -torch.inf)
        return Scores(noisy_logits.softmax(dim=-1), logits, noisy_logits)

    def reachable(self, rows: int) -> Tensor | None:
        """Says which experts each of R rows may reach: bool, (R, E) or (E,); None is all."""
        return None

    def decision_macs(self, tokens: int, images: int) -> int:
        """Counts one product with the weight a token."""
        return tokens * self.weight.numel()


def renormalised(gates: Tensor, total: Tensor, log_quotient: Callable[[], Tensor]) -> Tensor:
    """Divides gates by `total`, the sum over the experts that were chosen.

    What was chosen need not be likely (a bias, an expert that was full): where `total` is below
    `LEAST_SUM` or rounded to 0, the exponential of log_quotient() stands for the quotient. All
    other rows are divided as they are, to the bit. gates and what log_quotient gives: of one shape,
    to which total broadcasts.
    """
    tiny = total.detach() < LEAST_SUM
    if not torch.compiler.is_compiling() and not tiny.any():
        return gates / total
    # 1 in the place of what must not divide, since a gradient of 0 times infinity is no number
    divisor = torch.where(tiny, torch.ones_like(total), total)
    return torch.where(tiny, log_quotient().exp(), gates / divisor)


def one_in_value(gates: Tensor, deciding: Tensor, choice: Tensor) -> Tensor:
    """Renormalises the gates of one expert a row: 1 in value, with the gradient of log g.

    gates: (R, 1); deciding: (R, E) logits of the gates; choice: (R, 1).
    """

    def log_quotient() -> Tensor:
        log_gates = deciding.log_softmax(dim=-1).gather(1, choice)
        return log_gates - log_gates.detach()

    return renormalised(gates, gates.detach(), log_quotient)


def capacity(factor: float, top_k: int, tokens: int, experts: int) -> int:
    """Computes the slots of each expert: ceil(factor * K * T / E), at least one."""
    slots = factor * top_k * tokens / experts
    return max(1, math.ceil(slots - 1e-9))  # of a whole number, which the product may just miss


def check_pool(group: str) -> None:
    """Raises ValueError if `group` does not name the tokens that compete for experts."""
    if group not in ("image", "batch"):
        raise ValueError(
            f"group={group!r} is unknown: tokens compete within an 'image' or within the 'batch'"
        )


def fixed(choice: Tensor, experts: int, shape: tuple[int, int]) -> Routing:
    """Makes the Routing of decisions without a gate: probability and weight 1, logits 0.

    choice: (R, 1), the one expert of each row. shape: (B, N).
    """
    probs = F.one_hot(choice[:, 0], experts).float()
    weight = torch.ones(choice.shape, device=choice.device)
    return assign(choice, weight, probs, torch.zeros_like(probs), shape)


def assign(
    choice: Tensor,
    weight: Tensor,
    probs: Tensor,
    logits: Tensor,
    shape: tuple[int, int],
    capacity_factor: float | None = None,
    priority: Tensor | None = None,
) -> Routing:
    """Makes the Routing of chosen experts. choice, weight: (R, K); probs, logits: (R, E).

    Assignments are listed choice by choice (all first choices, then all second ones), and tokens by
    falling `priority`, (T,), or in their order, so that a full expert refuses the last tokens and
    lower choices first. shape: (B, N). capacity_factor: as `capacity` takes it; None refuses none.
    """
    b, n = shape
    tokens, top_k = b * n, choice.shape[-1]
    if choice.shape[0] == b and n > 1:  # (B, K) -> (T, K)
        choice_of_token = choice.repeat_interleave(n, dim=0)
        weight_of_token = weight.repeat_interleave(n, dim=0)
    else:
        choice_of_token, weight_of_token = choice, weight
    queue = torch.arange(tokens, device=choice.device)
    if priority is not None:
        queue = falling_order(priority)
        choice_of_token, weight_of_token = choice_of_token[queue], weight_of_token[queue]
    # (T, K) -> (A,), all first choices first
    expert, flat_weight = choice_of_token.t().reshape(-1), weight_of_token.t().reshape(-1)
    token = queue.repeat(top_k)
    dropped = torch.zeros(tokens, dtype=torch.long, device=choice.device)
    if capacity_factor is not None:
        slots = capacity(capacity_factor, top_k, tokens, probs.shape[-1])
        served = _place_in_line(expert, probs.shape[-1]) < slots
        dropped.index_add_(0, token[~served], torch.ones_like(token[~served]))
        token, expert, flat_weight = token[served], expert[served], flat_weight[served]
    return Routing(token, expert, flat_weight, probs, logits, choice, dropped, shape)


def falling_order(values: Tensor) -> Tensor:
    """Sorts values, (..., S), along their last axis, the largest first, equal ones as they stand.

    Returns the indices, (..., S). Traced, it counts instead of sorting, S squared comparisons: ONNX
    has no stable sort.
    """
    if not torch.compiler.is_compiling():
        return values.argsort(dim=-1, descending=True, stable=True)
    index = torch.arange(values.shape[-1], device=values.device)
    here, other = values.unsqueeze(-1), values.unsqueeze(-2)
    earlier = (other > here) | ((other == here) & (index < index.unsqueeze(-1)))  # (..., S, S)
    return torch.zeros_like(values, dtype=torch.long).scatter(
        -1, earlier.sum(dim=-1), index.expand(values.shape)
    )


def _place_in_line(expert: Tensor, experts: int) -> Tensor:
    """Numbers the assignments of each expert from 0, in the order of expert, (A,)."""
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=experts)
    start = counts.cumsum(0) - counts
    place = torch.empty_like(expert)
    place[order] = torch.arange(expert.numel(), device=expert.device) - start[expert[order]]
    return place
