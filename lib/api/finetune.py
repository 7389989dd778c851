"""Finetunes a model on a loader by the loop of the runs, with a teacher and balanced experts if
there are any.

Axis letters: **B** images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.balance import switch_loss
from ..models.modes import ambient_modes_off, autocasts, modes_kept
from ..models.moe import MoELayer, RoutingTape
from ..routers.manual import labelled
from ..spec import TrainSpec
from ..training.loop import Task, Trainer
from ..training.losses import distil_loss
from ..training.streams import check_stream, stream_for, stream_loss
from .loaders import (
    Batch,
    Loader,
    batches_of,
    check_batch,
    check_loader,
    check_logits,
    check_model,
    length,
    running_on,
)
from .modules import checked_seed, note, rules_of, to_change

DISTIL = 0.5  # weight of a teacher's predictions
LAYER_DECAY = 0.65  # rates fall by it from block to block, counted from the head (ViMoE)


def finetune(
    model: nn.Module,
    loader: Loader,
    val: Loader | None = None,
    *,
    epochs: float = 3.0,
    lr: float = 3e-4,
    layer_decay: float | None = None,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.0,
    teacher: nn.Module | None = None,
    distil: float | None = None,
    distil_stream: float | None = None,
    coefficient: float = 0.01,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Trains a classifier on a loader, and returns it.

    AdamW, a warm-up over a tenth of the steps and half a cosine, gradients clipped to norm 1: the
    loop of this book's runs. The loader batches, shuffles and augments; frozen parameters stay as
    they are.

    val: a loader for top-1 (percent) and loss before the first epoch and after each.
    epochs: passes over the loader, also parts of one.
    lr: peak rate of the head. layer_decay: factor on it a block, from the head down, for models of
    timm, which say where their blocks are (`group_matcher`); None is 0.65 for these, and 1 for
    others and with `distil_stream`, which teaches each block by itself.
    teacher: a model for the same classes, such as the dense one before pruning, whose predictions
    are learnt with weight `distil` (0.5 for None), and the labels with the rest. distil_stream: of
    all that, the weight of the teacher's residual stream (0 for None): each token after each block,
    normed, and what the head reads, for two VisionTransformers of timm of one depth and width. At 1
    neither labels nor predictions are learnt, and the head stays as it is but for its decay.
    coefficient: of `auxiliary_loss`, if an MoE layer has a router that learns.
    seed: of all that is drawn, also by a loader that shuffles with torch's global generator, which
    is left as it was.

    The model's modes and types stay as they are, and it is left alone unless `inplace`. It is
    trained in float32 or wider: a model in float16 or bfloat16, whose weights would not take small
    steps, is refused. Under a caller's autocast to bfloat16 passes of model and teacher are
    computed in it; losses, gradients of weights, steps and weights stay in their type. Autocast to
    float16 would want losses that are scaled, and is refused. No_grad and inference_mode are left.

    `model.finetuning` gets a row an epoch. Raises ValueError for what does not fit, by name, also
    for images that are not finite or that the model fails on, and `training.loop.Diverged` if the
    loss is not finite.
    """
    check_loader(loader)
    if val is not None:
        check_loader(val, "val")
    seed = checked_seed(seed)
    if any(on.fast_dtype == torch.float16 for on in autocasts()):
        raise ValueError(
            "autocast to float16 rounds small gradients away where losses are not scaled: finetune "
            "under torch.autocast(device_type, torch.bfloat16), or without autocast"
        )
    trained = to_change(model, inplace, "finetuning")
    _check_teacher(trained, teacher, distil=distil, distil_stream=distil_stream)
    _check_types(trained)
    if not any(p.requires_grad for p in trained.parameters()):
        raise ValueError("every parameter of the model is frozen: model.requires_grad_(True)")
    train = rules_of(
        TrainSpec,
        epochs=float(epochs),
        lr=float(lr),
        layer_decay=_decay(trained, layer_decay, distil_stream),
        weight_decay=float(weight_decay),
        label_smoothing=float(label_smoothing),
        distil_logits=float(DISTIL if distil is None else distil),
        distil_stream=float(distil_stream or 0.0),
    )
    task = _LoaderTask(trained, loader, val, teacher, train, coefficient)
    trainer = Trainer(trained, task, train, seed, "finetune")
    try:
        with (
            modes_kept(trained),
            modes_kept(teacher),
            torch.random.fork_rng(devices=[]),
            ambient_modes_off(),
        ):
            torch.manual_seed(seed)
            if teacher is not None:
                teacher.eval()
            trainer.run()
    finally:
        trained.zero_grad(set_to_none=True)  # the next loop, one's own, is not to begin with them
    return note(trained, "finetuning", trainer.progress.history)


def auxiliary_loss(tape: RoutingTape, coefficient: float = 0.01) -> Tensor:
    """Computes what a training loop of one's own adds to its loss, so that experts are used alike.

        with lib.RoutingTape(model) as tape:
            logits = model(images)
        loss = F.cross_entropy(logits, labels) + lib.auxiliary_loss(tape)

    It is the sum over MoE layers of the Switch loss (2101.03961, eq. 4: 1 for equal use, E where
    one of E experts gets all), times the coefficient. Routers that do not learn, as those of
    extracted experts, take no part. Raises ValueError if no router learns.
    """
    losses = [switch_loss(tape[layer]) for layer in _balanced(tape)]
    if not losses:
        raise ValueError(
            "the tape has no MoE layer whose router learns, so there is no load to balance: leave "
            "auxiliary_loss out"
        )
    return coefficient * torch.stack(losses).sum()


def _balanced(tape: RoutingTape) -> list[MoELayer]:
    """Lists the layers of a tape whose router learns by what it gave out: that of MoEfication's
    experts has weights, and decides without a gradient."""
    return [
        layer
        for layer, (_, routing) in zip(tape.layers, tape, strict=True)
        if any(parameter.requires_grad for parameter in layer.router.parameters())
        and (routing.probs.requires_grad or not torch.is_grad_enabled())
    ]


def _check_teacher(model: nn.Module, teacher: nn.Module | None, **weights: float | None) -> None:
    """Raises ValueError for a weight without a teacher, for one that learns as it teaches, and for
    models without the stream that is to be learnt."""
    if teacher is None:
        for name, weight in weights.items():
            if weight is not None:
                raise ValueError(
                    f"{name}={weight!r} weighs what a teacher gives, and there is none: give "
                    f"teacher=, or leave {name} out"
                )
        return
    check_model(teacher, "teacher")
    if weights["distil_stream"]:
        check_stream(model)
        check_stream(teacher)
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ValueError(
            "teacher shares trained parameters with model, so that it would teach what it learns: "
            "give a copy that stays as it is, copy.deepcopy(teacher)"
        )


def _check_types(model: nn.Module) -> None:
    """Raises ValueError where trained weights are too coarse for the steps of an optimiser, or
    have no gradients."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode(), and has no gradient: finetune a "
                "copy (inplace=False), or make the model outside"
            )
        if weight.requires_grad and torch.finfo(weight.dtype).bits < 32:
            raise ValueError(
                f"{name} is trained and of {weight.dtype}, which rounds small steps away: "
                "model.float(), finetune it on float32 images, and then .to("
                f"{weight.dtype}) what is returned"
            )


def _decay(model: nn.Module, layer_decay: float | None, distil_stream: float | None) -> float:
    """The factor of rates a block; ValueError for one on a model that does not tell its blocks."""
    tells = hasattr(model, "group_matcher")
    if layer_decay is None:  # the page static_rival compares both
        return LAYER_DECAY if tells and not distil_stream else 1.0
    if not tells and layer_decay != 1:
        raise ValueError(
            f"layer_decay={layer_decay} counts blocks, and {type(model).__name__} has no "
            "group_matcher, as models of timm have, to tell which they are: leave it out"
        )
    return float(layer_decay)


class _LoaderTask(Task):
    """Takes the batches of a loader in its own order, a pass an epoch."""

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        val: Loader | None,
        teacher: nn.Module | None,
        train: TrainSpec,
        coefficient: float,
    ):
        self.model, self.loader, self.val = model, loader, val
        self.teacher, self.train, self.coefficient = teacher, train, coefficient
        self.autocasts = autocasts()  # of the caller; backward passes run outside
        device = check_model(model)
        if teacher is not None and (there := check_model(teacher, "teacher")) != device:
            raise ValueError(
                f"teacher lies on {there} and model on {device}: teacher.to('{device}')"
            )
        with torch.random.fork_rng(devices=[]):  # a pass that counts may draw, and none may see it
            self.steps_per_epoch = length(loader) or sum(1 for _ in loader)
        if not self.steps_per_epoch:
            raise ValueError("loader gave no batch: it must hold images")
        self.under_way: Iterator[Batch] = iter(())

    def batch(self, step: int) -> Batch:
        """Gives the next batch of the loader; a new pass begins with each epoch."""
        if step % self.steps_per_epoch == 0:
            self.under_way = iter(self.loader)
        batch = next(self.under_way, None)
        if batch is None:
            raise ValueError(
                f"loader ended after {step % self.steps_per_epoch} batches of "
                f"{self.steps_per_epoch}: it must give as many in every pass"
            )
        return check_batch(batch, self.model)

    def _logits(
        self, model: nn.Module, images: Tensor, labels: Tensor, argument: str = "loader"
    ) -> Tensor:
        """Runs a model in the caller's arithmetic: (B, classes)."""
        with ExitStack() as stack, labelled(model, labels), running_on(images, model, argument):
            for autocast in self.autocasts:
                stack.enter_context(autocast)
            logits = model(images)
        return check_logits(logits, labels, model)

    def losses(self, images: Tensor, labels: Tensor, tape: RoutingTape) -> dict[str, Tensor]:
        """Computes the cross-entropy, the divergence from the teacher and from its stream, and the
        balance loss."""
        heard = partial(stream_for, self.train.distil_stream)
        with tape, heard(self.model) as stream:
            logits = self._logits(self.model, images, labels)
        task_loss = F.cross_entropy(
            logits.float(), labels, label_smoothing=self.train.label_smoothing
        )
        parts = {"task_loss": task_loss}
        total = task_loss
        if self.teacher is not None:
            with torch.no_grad(), heard(self.teacher) as target:
                taught = self._logits(self.teacher, images, labels)
            if taught.shape != logits.shape:
                raise ValueError(
                    f"teacher predicts {taught.shape[1]} classes and model {logits.shape[1]}: they "
                    "must be the same"
                )
            parts["distil_loss"] = distil_loss(logits, taught)
            total = torch.lerp(total, parts["distil_loss"], self.train.distil_logits)
            if self.train.distil_stream:
                parts["stream_loss"] = stream_loss(stream, target)
                total = torch.lerp(total, parts["stream_loss"], self.train.distil_stream)
        if _balanced(tape):
            parts["balance_loss"] = auxiliary_loss(tape, self.coefficient)
            total = total + parts["balance_loss"]
        return {"loss": total} | parts

    # not inference_mode: what a model caches at its first pass is needed when it is trained
    @torch.no_grad()
    def validated(self, model: nn.Module) -> dict[str, float] | None:
        """Evaluates on the validation loader: top-1 in percent, and cross-entropy."""
        if self.val is None:
            return None
        model.eval()
        count, correct, losses = 0, 0, []
        # a pass over a DataLoader draws, also without a shuffle: training is to go on as without it
        with torch.random.fork_rng(devices=[]):
            for images, labels in batches_of(self.val, model, "validate", "val"):
                logits = self._logits(model, images, labels, "val").float()
                losses.append(F.cross_entropy(logits, labels, reduction="sum").item())
                correct += int((logits.argmax(dim=-1) == labels).sum())
                count += len(labels)
        return {"val_top1": 100 * correct / count, "val_loss": math.fsum(losses) / count}
