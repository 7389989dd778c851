"""What moves the weights in a stage of training: AdamW, its rates, and which weights may move."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from ..models.backbone import heads_of
from ..models.ensemble import Ensemble
from ..spec import TrainSpec


def optimiser(model: nn.Module, train: TrainSpec) -> torch.optim.Optimizer:
    """Makes fused AdamW over timm's layer-decay groups.

    Biases are exempt from weight decay by name: stacked expert biases have two axes, and timm's own
    rule asks for one.
    """
    exempt = {*getattr(model, "no_weight_decay", set)(), "*.bias"}
    model = model.vit if isinstance(model, Ensemble) else model
    if hasattr(model, "group_matcher"):
        groups = param_groups_layer_decay(
            model, train.weight_decay, no_weight_decay_list=exempt, layer_decay=train.layer_decay
        )
    else:  # no head to count layers from: a masked autoencoder, or a module that timm did not make
        groups = param_groups_weight_decay(model, train.weight_decay, no_weight_decay_list=exempt)
    return create_optimizer_v2(
        groups, opt="adamw", lr=train.lr, weight_decay=train.weight_decay, fused=True
    )


def schedule(optim: torch.optim.Optimizer, train: TrainSpec, steps: int) -> CosineLRScheduler:
    """Makes a linear warm-up and half a cosine over all steps.

    Counted from 1, with one step beyond the end: neither the first nor the last step is lost to a
    rate of zero.
    """
    warmup = round(train.warmup * steps)
    return CosineLRScheduler(
        optim,
        t_initial=steps - warmup + 1,
        warmup_t=warmup,
        warmup_lr_init=0.0 if warmup else train.lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def freeze(model: nn.Module, trainable: str) -> None:
    """Leaves a gradient to the routers or the head alone, or to all but the attention layers."""
    heads = heads_of(model) if trainable == "head" else ()
    for name, parameter in model.named_parameters():
        wanted = {
            "routers": ".router." in name,
            "head": name.startswith(heads),
            "no_attention": ".attn." not in name,
        }
        parameter.requires_grad_(wanted[trainable])
