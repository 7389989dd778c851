"""MoE layers: how many, where, and how their routers choose."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Positive, Share, Spec


class MoESpec(Spec):
    """MoE layers in place of the MLPs of the last `layers` blocks, or of named ones (ViMoE, section
    3; `semantics` guards its meaning)."""

    layers: Positive = 1  # L: blocks counted from the last one
    # numbers of the L blocks, 1 at the input, rising; None = the last ones
    blocks: tuple[Positive, ...] | None = None
    experts: Positive = 8  # E, the shared expert not counted
    top_k: Positive = 1  # K
    router: Literal["token", "image", "all", "expert_choice", "priority", "manual", "soft"] = (
        "image"
    )
    # image: one decision from the class token; all: no router; token with top_k = experts: the
    # dense softmax mixture
    # what an image-level router reads; mean for models without class token
    pool: Literal["class", "mean"] = "class"
    shared: bool = False  # one more expert that every token passes, added with weight 1
    # printed: softmax weight as is; renormalised: sums to 1
    gate: Literal["printed", "renormalised"] = "printed"
    # slots per expert over K*T/E; None = no dropping
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    # std of logit noise in training, in units of 1/E (V-MoE: 1)
    noise: Annotated[float, Field(ge=0)] = 0.0
    # auxiliary loss, or bias updates without a loss
    balance: Literal["none", "switch", "loss_free"] = "switch"
    balance_weight: Annotated[float, Field(ge=0)] = 0.01  # of the switch loss (ViMoE: 0.01)
    bias_rate: Annotated[float, Field(gt=0)] = 1e-3  # step of the loss-free bias
    z_weight: Annotated[float, Field(ge=0)] = 0.0  # of the router z-loss (ST-MoE: 1e-3)
    router_std: Annotated[float, Field(ge=0)] = 0.02  # normal initialisation of the router
    # with capacity_factor: the surest tokens first (V-MoE), not the first ones
    batch_priority: bool = False
    # tokens that compete under expert_choice and priority
    group: Literal["image", "batch"] = "image"
    # expert_choice: experts that a token gets on average
    choices: Annotated[float, Field(gt=0)] = 1.0
    slots: Positive = 1  # soft: slots an expert
    # manual: the classes of each expert, in the order of the experts experts drawn anew instead of
    # copied; copies stay alike where nothing tells them apart
    groups: tuple[tuple[int, ...], ...] | None = None
    fresh_experts: bool = False
    # normal noise on copied experts, in standard deviations of each weight
    copy_noise: Annotated[float, Field(ge=0)] = 0.0
    # switch: one a MoE layer, from the input on; in place of balance_weight
    balance_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    # Durham: of the loss that sharpens the gate of a token
    sharpness_weight: Annotated[float, Field(ge=0)] = 0.0
    # Durham: of the loss that varies an expert's use over images
    variation_weight: Annotated[float, Field(ge=0)] = 0.0
    # added to the variances of these two; a tiny one lets them explode
    guard: Annotated[float, Field(gt=0)] = 1e-2
    # standard deviation instead of variance in the second one (our control)
    deviation: bool = False
    # chance that an image passes a layer without its routed experts, in training
    expert_dropout: Share = 0.0
    # M of an efficient ensemble (E3): the experts split into M groups, predictions averaged
    members: Positive = 1
    # share of training steps in which the experts with the largest response win (CompeteSMoE); None
    # = never
    compete_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    # with compete_rate: of the loss that pulls the router after them
    compete_weight: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _consistent(self):
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k={self.top_k} needs at least {self.top_k} experts, got experts={self.experts}"
            )
        if self.blocks is not None and (
            list(self.blocks) != sorted(set(self.blocks)) or len(self.blocks) != self.layers
        ):
            raise ValueError(
                f"blocks={self.blocks} must be layers={self.layers} different numbers in rising order"
            )
        if self.balance_weights is not None and (
            len(self.balance_weights) != self.layers or self.balance != "switch"
        ):
            raise ValueError(
                f"balance_weights has {len(self.balance_weights)} values: it takes layers={self.layers}, with "
                f"balance='switch', got balance={self.balance!r}"
            )
        if self.copy_noise and self.fresh_experts:
            raise ValueError(
                "copy_noise is added to copies; fresh_experts=True makes none: set one of them"
            )
        if self.router == "all" and self.top_k != self.experts:
            raise ValueError(
                f"router='all' sends each token to every expert: set top_k={self.experts}, got {self.top_k}"
            )
        if self.router == "all" and self.balance == "loss_free":
            raise ValueError(
                "balance='loss_free' moves a router's choice; router='all' has none: set balance='none'"
            )
        if self.capacity_factor is not None and self.router != "token":
            raise ValueError(
                f"capacity_factor is for router='token'; router={self.router!r} never drops tokens"
            )
        if self.batch_priority and self.capacity_factor is None:
            raise ValueError(
                "batch_priority=True orders tokens for full experts: it needs a capacity_factor"
            )
        if self.choices > self.experts:
            raise ValueError(
                f"choices={self.choices} is more than experts={self.experts}: a token cannot have an expert twice"
            )
        if self.router in ("priority", "manual") and self.top_k != 1:
            raise ValueError(
                f"router={self.router!r} gives a token one expert: set top_k=1, got {self.top_k}"
            )
        if (self.router == "manual") != (self.groups is not None):
            raise ValueError(
                "groups, the classes of each expert, go with router='manual' and with no other"
            )
        if self.groups is not None and len(self.groups) != self.experts:
            raise ValueError(f"groups names {len(self.groups)} experts, experts={self.experts}")
        if self.balance == "loss_free" and self.router not in ("token", "image"):
            raise ValueError(
                f"balance='loss_free' moves a top-k choice; router={self.router!r} has none"
            )
        if self.router == "soft" and (self.shared or self.expert_dropout):
            raise ValueError("router='soft' has no shared expert and no expert_dropout")
        if self.members > 1 and (
            self.router != "token" or self.experts % self.members or self.compete_rate
        ):
            raise ValueError(
                f"members={self.members} must divide experts={self.experts}, with router='token', no compete_rate, "
                f"got {self.router!r}"
            )
        if self.top_k > self.experts // self.members:
            raise ValueError(
                f"top_k={self.top_k} is more than the {self.experts // self.members} experts of each of "
                f"members={self.members}"
            )
        if self.compete_rate is not None and (self.router != "token" or self.noise):
            raise ValueError(
                "compete_rate compares responses to single tokens, without noise: set router='token', noise=0"
            )
        return self
