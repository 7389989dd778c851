"""What is minimised: the task's loss, the auxiliary losses on routings, and the distilled gates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.balance import batch_variation, sharpness_loss, switch_loss, variation_loss, z_loss
from ..models.compete import competition_loss
from ..models.ensemble import Ensemble
from ..models.moe import RoutingTape
from ..routers.manual import labelled
from ..spec import MoESpec, RunSpec
from .bfloat16 import products


@contextlib.contextmanager
def autocast(spec: RunSpec):
    """The arithmetic that the spec names: weights stay float32, bfloat16 applies to matrix products
    and activations."""
    with (
        products(spec),
        torch.autocast(spec.device, dtype=torch.bfloat16, enabled=spec.dtype == "bfloat16"),
    ):
        yield


def losses(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: RunSpec,
    tape: RoutingTape,
    teacher: nn.Module | None = None,
) -> dict[str, Tensor]:
    """The parts of the training loss, and their sum under `loss`. teacher: the dense parent, where
    gates are distilled.

    An ensemble's loss is the mean of its members' losses.
    """
    with tape, autocast(spec), labelled(model, labels):
        out = model.members(images).flatten(0, 1) if isinstance(model, Ensemble) else model(images)
    if spec.train.mask is not None:
        parts = {"task_loss": out.loss}
    else:
        wanted = labels.repeat(len(out) // len(labels))
        parts = {
            "task_loss": F.cross_entropy(
                out.float(), wanted, label_smoothing=spec.train.label_smoothing
            )
        }
    total = parts["task_loss"]
    if spec.train.distil_logits:
        with torch.no_grad(), autocast(spec):
            wanted = teacher(images).float()
        mine, theirs = out.float().log_softmax(dim=-1), wanted.log_softmax(dim=-1)
        parts["distil_loss"] = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
        total = torch.lerp(total, parts["distil_loss"], spec.train.distil_logits)
    if spec.moe is not None and spec.moe.learns:
        routings = tape.routings()
        parts["balance_loss"] = torch.stack([switch_loss(routing) for routing in routings]).mean()
        if not any(routing.per_image for routing in routings):
            parts["batch_variation"] = torch.stack(
                [batch_variation(routing) for routing in routings]
            ).mean()
        for weights, each in _auxiliary(spec.moe):
            found = torch.stack([each(routing) for routing in routings])
            total = total + (found * found.new_tensor(weights)).sum()
        if spec.train.distil != "none":
            parts["distil_loss"] = _distilled(routings, teacher, images, spec)
            total = total + parts["distil_loss"]
    return {"loss": total} | parts


def _auxiliary(moe: MoESpec) -> list[tuple[float | tuple[float, ...], Callable]]:
    """(weight, loss) of the auxiliary losses in force; each is summed over the MoE layers, with one
    weight or one a layer."""
    balance = moe.balance_weights or moe.balance_weight
    listed = [
        (balance if moe.balance == "switch" else 0.0, switch_loss),
        (moe.z_weight, z_loss),
        (moe.sharpness_weight, partial(sharpness_loss, guard=moe.guard)),
        (moe.variation_weight, partial(variation_loss, guard=moe.guard, deviation=moe.deviation)),
        (moe.compete_weight if moe.compete_rate else 0.0, competition_loss),
    ]
    return [(weight, loss) for weight, loss in listed if weight]


def _distilled(routings: list, teacher: nn.Module, images: Tensor, spec: RunSpec) -> Tensor:
    """Mean over layers of the cross-entropy to the teacher's choice, or of the divergence from its
    probabilities, in nats.

    The teacher sees the same images through its own layers, so the target is what the dense model
    decides.
    """
    with torch.no_grad(), RoutingTape(teacher) as tape, autocast(spec):
        teacher(images)
    found = []
    for mine, theirs in zip(routings, tape.routings(), strict=True):
        if spec.train.distil == "choice":
            found.append(F.cross_entropy(mine.logits, theirs.probs.argmax(dim=-1)))
        else:
            found.append(
                F.kl_div(mine.logits.log_softmax(dim=-1), theirs.probs, reduction="batchmean")
            )
    return torch.stack(found).mean()
