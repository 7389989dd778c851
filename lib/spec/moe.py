"""MoE layers: how many, where, and how their routers choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .base import (
    MOST_EXPERTS,
    ClassNumber,
    Depth,
    Experts,
    Guard,
    Rate,
    Share,
    Size,
    Spec,
    Weight,
)


@dataclass(frozen=True)
class RouterWord:
    """Says what a specification must know of a router; its class stands in `lib.routers`."""

    # of the fields of MoESpec and TrainSpec that not every router understands, those that it does
    takes: frozenset[str]
    needs: frozenset[str] = frozenset()  # of these the ones that have no default
    learns: bool = True  # False: it has nothing that an auxiliary loss could teach
    per_image: bool = False  # one decision for all tokens of an image
    every_expert: bool = False  # top_k must be E
    serves_all: bool = True  # False: a token may pass no expert, or share one with others


_LAYER = frozenset({"shared", "expert_dropout"})
_GATE = _LAYER | {"gate", "noise", "router_std"}
_TOP_K = _GATE | {"top_k", "bias_rate"}  # bias_rate: balance='loss_free'
_COMPETE = {"compete_rate", "compete_weight"}
_CAPACITY = {"capacity_factor", "batch_priority"}

# Every router: its word in a spec, and what may be said of it there.
ROUTERS: dict[str, RouterWord] = {
    "token": RouterWord(_TOP_K | _CAPACITY | _COMPETE | {"members", "single_expert_at"}),
    "image": RouterWord(_TOP_K | {"pool"}, per_image=True),
    "all": RouterWord(_LAYER | {"gate", "top_k"}, learns=False, every_expert=True),
    "expert_choice": RouterWord(_GATE | {"choices", "group"}, serves_all=False),
    "priority": RouterWord(_GATE | {"group"}),
    "manual": RouterWord(
        _LAYER | {"groups"}, needs=frozenset({"groups"}), learns=False, per_image=True
    ),
    "soft": RouterWord(frozenset({"slots"}), serves_all=False),
}


class MoESpec(Spec):
    """Describes the MoE layers that stand in the place of MLPs, and how their routers are balanced.

    ViMoE, section 3; `semantics` guards its meaning.
    """

    layers: Depth = 1  # L: blocks counted from the last one
    # numbers of the L blocks, 1 at the input, rising; None = the last ones
    blocks: tuple[Depth, ...] | None = None
    experts: Experts = 8  # E, the shared expert not counted
    top_k: Experts = 1  # K
    # image: one decision from the class token; all: no choice; token with top_k = experts: the
    # dense softmax mixture
    router: Literal[tuple(ROUTERS)] = "image"
    # what an image-level router reads; mean for models without class token
    pool: Literal["class", "mean"] = "class"
    shared: bool = False  # one more expert that every token passes, added with weight 1
    # printed: softmax weight as is; renormalised: sums to 1
    gate: Literal["printed", "renormalised"] = "printed"
    # slots per expert over K*T/E; None = no dropping
    capacity_factor: Annotated[float, Field(gt=0, le=MOST_EXPERTS)] | None = None
    # std of logit noise in training, in units of 1/E (V-MoE: 1)
    noise: Weight = 0.0
    # auxiliary loss, or bias updates without a loss
    balance: Literal["none", "switch", "loss_free"] = "switch"
    balance_weight: Weight = 0.01  # of the switch loss (ViMoE: 0.01)
    bias_rate: Rate = 1e-3  # step of the loss-free bias
    z_weight: Weight = 0.0  # of the router z-loss (ST-MoE: 1e-3)
    router_std: Weight = 0.02  # normal initialisation of the router
    # with capacity_factor: the surest tokens first (V-MoE), not the first ones
    batch_priority: bool = False
    # tokens that compete under expert_choice and priority
    group: Literal["image", "batch"] = "image"
    # expert_choice: experts that a token gets on average
    choices: Annotated[float, Field(gt=0, le=MOST_EXPERTS)] = 1.0
    slots: Size = 1  # soft: slots an expert
    # manual: the classes of each expert, in the order of the experts
    groups: tuple[tuple[ClassNumber, ...], ...] | None = None
    # experts drawn anew instead of copied; copies stay alike where nothing tells them apart
    fresh_experts: bool = False
    # normal noise on copied experts, in standard deviations of each weight
    copy_noise: Weight = 0.0
    # switch: one an MoE layer, from the input on; in place of balance_weight
    balance_weights: tuple[Weight, ...] | None = None
    # Durham: of the loss that sharpens the gate of a token
    sharpness_weight: Weight = 0.0
    # Durham: of the loss that varies an expert's use over images
    variation_weight: Weight = 0.0
    # added to the variances of these two; a tiny one lets them explode
    guard: Guard = 1e-2
    # standard deviation instead of variance in the second one (our control)
    deviation: bool = False
    # chance that an image passes a layer without its routed experts, in training
    expert_dropout: Share = 0.0
    # M of an efficient ensemble (E3): the experts split into M groups, predictions averaged
    members: Experts = 1
    # share of training steps in which the experts with the largest response win (CompeteSMoE); None
    # = never
    compete_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    # with compete_rate: of the loss that pulls the router after them. A balance loss would train
    # the experts in the steps in which they compete: set balance_weight=0
    compete_weight: Weight = 1.0

    @property
    def learns(self) -> bool:
        """Says whether the router has weights that training moves."""
        return ROUTERS[self.router].learns

    @property
    def per_image(self) -> bool:
        """Says whether one decision serves all tokens of an image."""
        return ROUTERS[self.router].per_image

    @property
    def reads_class_token(self) -> bool:
        """Says whether the router decides from the class token, which a model may lack."""
        return self.takes("pool") and self.pool == "class"

    def takes(self, field: str) -> bool:
        """Says whether the router understands a field that only some routers do."""
        return field in ROUTERS[self.router].takes

    @model_validator(mode="after")
    def _layers_fit(self):
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k={self.top_k} needs at least {self.top_k} experts, "
                f"got experts={self.experts}"
            )
        if self.blocks is not None and (
            list(self.blocks) != sorted(set(self.blocks)) or len(self.blocks) != self.layers
        ):
            raise ValueError(
                f"blocks={self.blocks} must be layers={self.layers} different numbers "
                "in rising order"
            )
        if self.copy_noise and self.fresh_experts:
            raise ValueError(
                "copy_noise is added to copies; fresh_experts=True makes none: set one of them"
            )
        return self

    @model_validator(mode="after")
    def _router_takes_what_is_set(self):
        for name, default in options_without(self.router).items():
            if getattr(self, name) != default:
                takers = [word for word, router in ROUTERS.items() if name in router.takes]
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for router={_either(takers)}; "
                    f"router={self.router!r} does not take it: leave it at {default!r}"
                )
        for name in ROUTERS[self.router].needs:
            if getattr(self, name) is None:
                raise ValueError(f"router={self.router!r} needs {name}, got None: set it")
        if ROUTERS[self.router].every_expert and self.top_k != self.experts:
            raise ValueError(
                f"router={self.router!r} sends each token to every expert: "
                f"set top_k={self.experts}, got {self.top_k}"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_each_other(self):
        if self.batch_priority and self.capacity_factor is None:
            raise ValueError(
                "batch_priority=True orders tokens for full experts: it needs a capacity_factor"
            )
        if self.choices > self.experts:
            raise ValueError(
                f"choices={self.choices} is more than experts={self.experts}: "
                "a token cannot have an expert twice"
            )
        if self.groups is not None and len(self.groups) != self.experts:
            raise ValueError(
                f"groups names {len(self.groups)} experts, experts={self.experts}: give each "
                "expert a tuple of its classes"
            )
        if self.members > 1 and (self.experts % self.members or self.compete_rate):
            raise ValueError(
                f"members={self.members} must divide experts={self.experts}, "
                f"with no compete_rate, got compete_rate={self.compete_rate}"
            )
        if self.top_k > self.experts // self.members:
            raise ValueError(
                f"top_k={self.top_k} is more than the {self.experts // self.members} experts "
                f"of each of members={self.members}"
            )
        if self.compete_rate is not None and self.noise:
            raise ValueError(
                "compete_rate compares responses to single tokens, without noise: set noise=0, "
                f"got noise={self.noise}"
            )
        return self

    @model_validator(mode="after")
    def _balance_fits(self):
        if self.balance_weights is not None and (
            len(self.balance_weights) != self.layers or self.balance != "switch"
        ):
            raise ValueError(
                f"balance_weights has {len(self.balance_weights)} values: it takes "
                f"layers={self.layers}, with balance='switch', got balance={self.balance!r}"
            )
        if self.balance == "loss_free" and not self.takes("bias_rate"):
            raise ValueError(
                f"balance='loss_free' moves a top-k choice; router={self.router!r} has none: "
                "set balance='none'"
            )
        asked = [
            name
            for name in ("z_weight", "sharpness_weight", "variation_weight")
            if getattr(self, name)
        ]
        if not self.learns and (asked or self.balance != "none"):
            raise ValueError(
                f"router={self.router!r} has nothing to learn, so no auxiliary loss can teach it: "
                "set balance='none', and leave z_weight, sharpness_weight and variation_weight "
                f"at 0; got balance={self.balance!r}"
                + "".join(f", {name}={getattr(self, name)}" for name in asked)
            )
        return self


def options_without(word: str) -> dict[str, Any]:
    """Lists the options of MoESpec that a router does not take, with their defaults."""
    options = frozenset().union(*(router.takes for router in ROUTERS.values()))
    return {
        name: field.get_default()
        for name, field in MoESpec.model_fields.items()
        if name in options and name not in ROUTERS[word].takes
    }


def _either(words: list[str]) -> str:
    """Lists words as "'a', 'b' or 'c'"."""
    quoted = [repr(word) for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)
