"""What is minimised: the task's loss, the auxiliary losses on routings, and the distilled gates.

Axis letters: **B** images, **M** members of an ensemble, **L** MoE layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.balance import batch_variation, sharpness_loss, switch_loss, variation_loss, z_loss
from ..models.compete import competition_loss
from ..models.ensemble import Ensemble
from ..models.moe import RoutingTape
from ..routers.base import Routing
from ..routers.manual import labelled
from ..spec import MoESpec, RunSpec
from .bfloat16 import products
from .ranks import ONE, One, Ranks
from .streams import stream_for, stream_loss


@contextlib.contextmanager
def autocast(spec: RunSpec):
    """Switches to the arithmetic that the spec names, inside.

    Weights stay float32; bfloat16 applies to matrix products and activations.
    """
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
    ranks: One = ONE,
) -> dict[str, Tensor]:
    """Computes the parts of the training loss, and their weighted sum under `loss`.

    images: (B, channels, height, width); labels: (B,). teacher: the parent, where it is
    distilled. An ensemble's loss is the mean of its members' losses. ranks: each of
    which brings its share of the images; all get the losses of the whole batch, and the tape holds
    the routings of the whole batch afterwards.
    """
    members, own_labels = model.size if isinstance(model, Ensemble) else 1, labels
    heard = partial(stream_for, spec.train.distil_stream)
    with (
        tape,
        autocast(spec),
        labelled(model, labels),
        ranks.draws(members),
        heard(model) as stream,
    ):
        out = model.members(images).flatten(0, 1) if isinstance(model, Ensemble) else model(images)
    if ranks.count > 1:
        out, labels = _of_all_ranks(out, labels, spec, tape, ranks, members)
    if spec.train.mask is not None:
        parts = {"task_loss": out.loss}
    else:
        targets = labels.repeat(len(out) // len(labels))  # once for each member: (M*B,)
        smoothing = spec.train.label_smoothing
        task_loss = F.cross_entropy(out.float(), targets, label_smoothing=smoothing)
        parts = {"task_loss": task_loss}
    total = parts["task_loss"]
    if spec.train.distil_logits or spec.train.distil_stream:
        with (
            torch.no_grad(),
            autocast(spec),
            labelled(teacher, own_labels),
            heard(teacher) as target,
        ):
            (teacher_logits,) = ranks.whole([teacher(images)])
    if spec.train.distil_logits:
        parts["distil_loss"] = distil_loss(out, teacher_logits)
        total = torch.lerp(total, parts["distil_loss"], spec.train.distil_logits)
    if spec.train.distil_stream:
        parts["stream_loss"] = ranks.mean(stream_loss(stream, target))
        total = torch.lerp(total, parts["stream_loss"], spec.train.distil_stream)
    if spec.moe is not None and spec.moe.learns:
        routings = tape.routings()
        parts["balance_loss"] = torch.stack([switch_loss(routing) for routing in routings]).mean()
        if not any(routing.per_image for routing in routings):
            parts["batch_variation"] = torch.stack(
                [batch_variation(routing) for routing in routings]
            ).mean()
        for weights, auxiliary_loss in _auxiliary(spec.moe):
            loss_of_layer = torch.stack([auxiliary_loss(routing) for routing in routings])  # (L,)
            total = total + (loss_of_layer * loss_of_layer.new_tensor(weights)).sum()
        if spec.train.distil != "none":
            parts["distil_loss"] = _distilled(routings, teacher, (images, own_labels), spec, ranks)
            total = total + parts["distil_loss"]
    return {"loss": total} | parts


def _of_all_ranks(
    out: Any, labels: Tensor, spec: RunSpec, tape: RoutingTape, ranks: Ranks, members: int
) -> tuple[Any, Tensor]:
    """Returns the outputs and labels of the whole batch, and puts its routings on the tape.

    out: (M*B, classes) logits of this rank's images, or what a masked autoencoder gives.
    """
    if spec.moe is not None and spec.moe.learns:
        tape.replace(_joined(tape.routings(), ranks))
    if spec.train.mask is not None:  # every image hides as many patches
        return replace(out, loss=ranks.mean(out.loss)), labels
    by_image = out.view(members, len(labels), out.shape[-1]).transpose(0, 1)  # (B, M, classes)
    out, labels = ranks.whole([by_image, labels])
    return out.transpose(0, 1).flatten(0, 1), labels


def _joined(routings: Sequence[Routing], ranks: Ranks) -> list[Routing]:
    """Joins the routings of all ranks, a layer each; rows are numbered anew."""
    names = ("token", "expert", "weight", "probs", "logits", "choice", "dropped")
    copies = routings[0].shape[0] // max(1, ranks.share.stop - ranks.share.start)  # by an ensemble
    shares = []
    for routing in routings:
        tensors = {name: getattr(routing, name) for name in names}
        tensors["token"] = routing.token + copies * ranks.share.start * routing.shape[1]
        shares += tensors.values()
    joined = ranks.whole(shares)
    whole = []
    for number, routing in enumerate(routings):
        fields = dict(zip(names, joined[number * len(names) :], strict=False))
        images = len(fields["dropped"]) // routing.shape[1]
        whole.append(Routing(**fields, shape=(images, routing.shape[1])))
    return whole


def distil_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Computes the divergence of predictions from a teacher's, (B, classes) logits each, in nats an
    image."""
    return F.kl_div(
        logits.float().log_softmax(dim=-1),
        teacher_logits.float().log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def _auxiliary(moe: MoESpec) -> list[tuple[float | tuple[float, ...], Callable]]:
    """Lists (weight, loss) of the auxiliary losses in force.

    Each is summed over the MoE layers, with one weight for all or one a layer.
    """
    balance = moe.balance_weights or moe.balance_weight
    listed = [
        (balance if moe.balance == "switch" else 0.0, switch_loss),
        (moe.z_weight, z_loss),
        (moe.sharpness_weight, partial(sharpness_loss, guard=moe.guard)),
        (moe.variation_weight, partial(variation_loss, guard=moe.guard, deviation=moe.deviation)),
        (moe.compete_weight if moe.compete_rate else 0.0, competition_loss),
    ]
    return [(weight, loss) for weight, loss in listed if weight]


def _distilled(
    routings: list[Routing],
    teacher: nn.Module,
    batch: tuple[Tensor, Tensor],
    spec: RunSpec,
    ranks: One,
) -> Tensor:
    """Computes the mean over layers of the cross-entropy to the teacher's choice, or of the
    divergence from its probabilities, in nats.

    The teacher sees the same images through its own layers, so the target is what the dense model
    decides. batch: images and labels of this rank.
    """
    images, labels = batch
    with torch.no_grad(), RoutingTape(teacher) as tape, autocast(spec), labelled(teacher, labels):
        teacher(images)
    targets = ranks.whole([routing.probs for routing in tape.routings()])
    loss_of_layer = []
    for student, target in zip(routings, targets, strict=True):
        if spec.train.distil == "choice":
            loss = F.cross_entropy(student.logits, target.argmax(dim=-1))
        else:
            log_probs = student.logits.log_softmax(dim=-1)
            loss = F.kl_div(log_probs, target, reduction="batchmean")
        loss_of_layer.append(loss)
    return torch.stack(loss_of_layer).mean()
