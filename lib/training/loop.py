"""One training loop.

AdamW (fused), warm-up and cosine per step, layer-wise learning-rate decay: all timm's. What is
ours: a checkpoint that resumes to the same weights as an unbroken run, and randomness that depends
on seed and step alone.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from tqdm.auto import tqdm

from .. import paths
from ..inputs.splits import Split
from ..models.balance import update_choice_bias
from ..models.ensemble import Ensemble
from ..models.moe import RoutingTape
from ..pruning.experts.progressive import ProgressiveDrop
from ..pruning.neurons.masks import apply_masks
from ..spec import RunSpec
from .evaluate import Evaluation, evaluate
from .losses import losses as _losses

CURVE_POINTS = 60  # training-loss points kept a run
# at least this long between checkpoints, and at least 20 times what writing one took
CHECKPOINT_SECONDS = 60


class Diverged(RuntimeError):
    """The loss is not finite. `step` and `last` (finite values before it) go into the failed
    record."""

    def __init__(self, step: int, last: list[float]):
        super().__init__(
            f"loss is not finite at step {step}; the last finite values were "
            f"{', '.join(f'{value:.4g}' for value in last) or 'none'}. A lower lr or a longer warmup may help"
        )
        self.step, self.last = step, last


@dataclass
class Progress:
    """What a stage leaves behind beside the weights. `seconds` and what derives from it is timing,
    never result."""

    history: list[dict] = field(default_factory=list)
    curve: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "loss": []})
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch under way
    seconds: float = 0.0
    images: int = 0


def optimiser(model: nn.Module, spec: RunSpec) -> torch.optim.Optimizer:
    """Fused AdamW over timm's layer-decay groups.

    Biases are exempt from weight decay by name: stacked expert biases have two axes, and timm's own
    rule asks for one.
    """
    train = spec.train
    kept = {*getattr(model, "no_weight_decay", set)(), "*.bias"}
    model = model.vit if isinstance(model, Ensemble) else model
    if hasattr(model, "group_matcher"):
        groups = param_groups_layer_decay(
            model, train.weight_decay, no_weight_decay_list=kept, layer_decay=train.layer_decay
        )
    else:  # a masked autoencoder: no head to count layers from
        groups = param_groups_weight_decay(model, train.weight_decay, no_weight_decay_list=kept)
    return create_optimizer_v2(
        groups, opt="adamw", lr=train.lr, weight_decay=train.weight_decay, fused=True
    )


def fit(
    model: nn.Module,
    data: Split,
    val: Split,
    spec: RunSpec,
    checkpoint: Path | None = None,
    report: Callable[[dict], None] | None = None,
    teacher: nn.Module | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
) -> tuple[nn.Module, Progress]:
    """Train `model` in place; returns the model to evaluate (the weight average if `ema` is set)
    and its Progress.

    checkpoint: a file to resume from and to write to, deleted by the caller. report: called with
    each epoch's history row. teacher: the dense model whose gates are distilled. masks: of pruned
    weights, which stay zero. Randomness (order, augmentation, drop path, router noise) depends on
    `spec.seed` and the step, so that a resumed run ends with the same weights. Raises Diverged if
    the loss is not finite.
    """
    train = spec.train
    if train.trainable != "all":
        freeze(model, train.trainable)
    per_epoch = -(-len(data) // train.batch)
    steps = max(1, round(train.epochs * per_epoch))
    drop = (
        ProgressiveDrop(model, steps, end=train.single_expert_at)
        if train.single_expert_at
        else None
    )
    optim = optimiser(model, spec)
    warm = round(train.warmup * steps)
    # Counted from 1, with one step beyond the end: neither the first nor the last step is lost to a
    # rate of zero.
    schedule = CosineLRScheduler(
        optim,
        t_initial=steps - warm + 1,
        warmup_t=warm,
        warmup_lr_init=0.0 if warm else train.lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    average = ModelEmaV3(model, decay=train.ema, use_warmup=True) if train.ema is not None else None
    progress, start = Progress(), 0
    if checkpoint is not None and checkpoint.is_file():
        start = _resume(checkpoint, model, optim, average, progress, drop)
    if start == 0 and val is not None:
        progress.history.append({"epoch": 0.0} | _named("val", evaluate(model, val, spec)))
    every = max(1, steps // CURVE_POINTS)
    tape = RoutingTape(model)
    recent: list[float] = []
    wrote, write_cost, order = time.monotonic(), 0.0, None
    bar = tqdm(
        total=steps,
        initial=start,
        unit="step",
        desc=f"train {spec.id[:6]}",
        leave=False,
        delay=5,
        mininterval=1.0,
    )
    with torch.random.fork_rng(devices=[]), bar:
        for step in range(start, steps):
            began = time.perf_counter()
            epoch, at = divmod(step, per_epoch)
            if order is None or at == 0:
                order = torch.randperm(len(data), generator=_generator(spec.seed, 1, epoch))
            index = order[at * train.batch : (at + 1) * train.batch]
            images = data.batch(index, spec.data, _generator(spec.seed, 2, step)).to(spec.device)
            torch.manual_seed(_mix(spec.seed, 3, step))
            schedule.step_update(step + 1)
            model.train()
            parts = _losses(model, images, data.labels[index].to(spec.device), spec, tape, teacher)
            loss = float(parts["loss"].detach())
            if not math.isfinite(loss):
                raise Diverged(step, recent)
            optim.zero_grad(set_to_none=True)
            parts["loss"].backward()
            if train.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), train.clip)
            optim.step()
            if masks:
                apply_masks(model, masks)
            if drop is not None:
                drop.after(step, tape)
            if spec.moe is not None and spec.moe.balance == "loss_free":
                for layer in tape.layers:
                    update_choice_bias(layer.router, tape[layer], spec.moe.bias_rate)
            if average is not None:
                average.update(model, step=step)
            recent = (recent + [loss])[-5:]
            for name, value in parts.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + float(value.detach())
            progress.seconds += time.perf_counter() - began
            progress.images += len(index)
            _point(progress.curve, step, loss, every)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            done = step + 1
            if done % per_epoch == 0 or done == steps:
                row = {
                    "epoch": done / per_epoch,
                    "lr": optim.param_groups[0]["lr"] / optim.param_groups[0].get("lr_scale", 1.0),
                }
                row |= {f"train_{name}": value / (at + 1) for name, value in progress.sums.items()}
                if val is not None:
                    row |= _named("val", evaluate(average.module if average else model, val, spec))
                    if not math.isfinite(
                        row["val_loss"]
                    ):  # the last step may break the weights after a finite loss
                        raise Diverged(done, recent)
                progress.history.append(row)
                progress.sums = {}
                if report is not None:
                    report(row)
            if (
                checkpoint is not None
                and done < steps
                and time.monotonic() - wrote > max(CHECKPOINT_SECONDS, 20 * write_cost)
            ):
                wrote = time.monotonic()
                try:
                    _write(checkpoint, done, model, optim, average, progress, drop)
                except OSError as error:  # a full disk costs the checkpoint, not the run
                    warnings.warn(
                        f"run {spec.id}: the checkpoint at step {done} was not written ({error})",
                        stacklevel=2,
                    )
                write_cost = time.monotonic() - wrote
    if drop is not None:
        drop.finish()
    return (average.module if average else model), progress


def freeze(model: nn.Module, trainable: str) -> None:
    """Leave a gradient to the routers or the head alone, or to all but the attention layers."""
    head = (
        {id(parameter) for parameter in model.get_classifier().parameters()}
        if trainable == "head"
        else set()
    )
    for name, parameter in model.named_parameters():
        wanted = {
            "routers": ".router." in name,
            "head": id(parameter) in head,
            "no_attention": ".attn." not in name,
        }
        parameter.requires_grad_(wanted[trainable])


def _named(split: str, result: Evaluation) -> dict[str, float]:
    top1 = {} if result.top1 is None else {f"{split}_top1": result.top1}
    return top1 | {f"{split}_loss": result.loss}


def _point(curve: dict[str, list[float]], step: int, loss: float, every: int) -> None:
    """Running mean of the loss over windows of `every` steps; `step` is the last step of the
    window."""
    if step % every == 0:
        curve["step"].append(step + 1)
        curve["loss"].append(loss)
    else:
        count = step % every
        curve["step"][-1] = step + 1
        curve["loss"][-1] += (loss - curve["loss"][-1]) / (count + 1)


def _mix(*parts: int) -> int:
    """One seed from several numbers, without the collisions that a sum would have."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed


def _generator(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mix(*parts))


def _write(
    file: Path, step: int, model: nn.Module, optim, average, progress: Progress, drop
) -> None:
    """Everything that the next step depends on. Data order and noise follow from seed and step, so
    no generator state."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optim": optim.state_dict(),
        "progress": vars(progress),
        "average": average.module.state_dict() if average else None,
        "drop": drop.state_dict() if drop else None,
    }
    with paths.written_whole(file) as part:
        torch.save(state, part)


def _resume(file: Path, model: nn.Module, optim, average, progress: Progress, drop) -> int:
    """Load a checkpoint into its owners; returns the step to go on from, 0 if the file is damaged."""
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        warnings.warn(
            f"checkpoint {file} cannot be read ({error}): training starts anew", stacklevel=3
        )
        return 0
    model.load_state_dict(state["model"])
    optim.load_state_dict(state["optim"])
    if average:
        average.module.load_state_dict(state["average"])
    if drop:
        drop.load_state_dict(state["drop"])
    vars(progress).update(state["progress"])
    return state["step"]
