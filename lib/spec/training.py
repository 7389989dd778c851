"""Describes how a model is trained: masked pretraining, and one stage of optimisation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Depth, Guard, Positive, Rate, Share, Size, Spec, Weight


class MaskSpec(Spec):
    """Describes masked pretraining: what is hidden, and the decoder that fills it in.

    Source: masked autoencoders (MAE), 2111.06377.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # share of the patches that is hidden
    width: Size = 192  # D of the decoder
    depth: Depth = 4  # decoder blocks
    heads: Size = 6  # decoder attention heads; must divide the decoder width

    @model_validator(mode="after")
    def _consistent(self):
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"decoder width={self.width} must be a multiple of heads={self.heads} and of 4 "
                "(its fixed two-dimensional position table)"
            )
        return self


class TrainSpec(Spec):
    """Describes one stage of training.

    AdamW, warm-up and cosine per step, learning rates that decay from layer to layer (timm).
    """

    # passes over the training images; may be fractional
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 3.0
    batch: Positive = 64  # images a step
    lr: Rate = 3e-4  # peak learning rate of the head
    # AdamW's; none on biases, norms and position embeddings (which decay in ensembles)
    weight_decay: Weight = 0.05
    # lr factor a block, from the head down (ViMoE: 0.65)
    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    warmup: Share = 0.1  # share of all steps
    label_smoothing: Share = 0.0
    clip: Guard | None = 1.0  # largest gradient norm
    ema: Share | None = None  # decay of the weight average that is evaluated; None = no average
    mask: MaskSpec | None = None  # pretraining by reconstruction instead of classification
    # routers, head: everything else is frozen; no_attention: attention alone is
    trainable: Literal["all", "routers", "head", "no_attention"] = "all"
    # the parent's gates as target: their argmax or softmax
    distil: Literal["none", "choice", "probabilities"] = "none"
    # weight of the parent's logits as target, the rest is the labels'
    distil_logits: Annotated[float, Field(ge=0, le=1)] = 0.0
    # weight of the parent's residual stream as target, the rest is that of labels and logits
    distil_stream: Annotated[float, Field(ge=0, le=1)] = 0.0
    # share of the steps in which experts are dropped one after the other, until each MoE layer has
    # one (2206.00277: 0.5); None = all stay
    single_expert_at: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def has_teacher(self) -> bool:
        """Says whether the model that the run starts from computes each training image as well."""
        return self.distil != "none" or self.distil_logits > 0 or self.distil_stream > 0
