"""One training loop.

AdamW (fused), warm-up and cosine per step, layer-wise learning-rate decay: all timm's. What is
ours: a checkpoint that resumes to the same weights as an unbroken run, and randomness that depends
on seed and step alone. Axis letters: **B** images.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..inputs.splits import Split, Wanted
from ..models.balance import update_choice_bias
from ..models.moe import RoutingTape
from ..pruning.experts.progressive import ProgressiveDrop
from ..pruning.neurons.masks import apply_masks
from ..spec import RunSpec, TrainSpec
from .checkpoint import Checkpoint
from .evaluate import evaluate
from .losses import losses
from .optimiser import freeze, optimiser, schedule
from .order import NOISE, batches_from, mix, steps_in_all, steps_in_epoch
from .ranks import ONE, One

CURVE_POINTS = 60  # training-loss points kept a run
LAST_LOSSES = 5  # finite ones that a diverged run reports


class Diverged(RuntimeError):
    """The loss is not finite. `step` and `last` (finite values before it) go into the failed
    record."""

    def __init__(self, step: int, last: list[float]):
        values = ", ".join(f"{value:.4g}" for value in last) or "none"
        super().__init__(
            f"loss is not finite at step {step}; the last finite values were {values}. A lower lr "
            "or a longer warmup may help"
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


class Task(ABC):
    """Says what a stage of training learns from: its batches, its loss, and how it is validated."""

    steps_per_epoch: int

    @abstractmethod
    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Gives the images (B, channels, height, width) and labels (B,) of a step, counted from 0,
        where the model is."""

    @abstractmethod
    def losses(self, images: Tensor, labels: Tensor, tape: RoutingTape) -> dict[str, Tensor]:
        """Computes what is minimised under `loss`, and the parts that the history shows.

        tape: of the model, closed; routings are read from it once it was opened around a pass.
        """

    @abstractmethod
    def validated(self, model: nn.Module) -> dict[str, float] | None:
        """Evaluates a model for a row of the history; None without images for it."""

    def after_update(self, tape: RoutingTape) -> None:  # noqa: B027
        """Does what follows each update of the weights: nothing, if not said otherwise."""


class RunTask(Task):
    """Takes batches out of a split, and the losses of a run."""

    def __init__(
        self,
        model: nn.Module,
        data: Split,
        val: Split | None,
        spec: RunSpec,
        teacher: nn.Module | None = None,
        ranks: One = ONE,
    ):
        self.model, self.data, self.val, self.spec = model, data, val, spec
        self.teacher, self.ranks = teacher, ranks
        self.steps_per_epoch = steps_in_epoch(spec.train, len(data))
        self.next_step = -1  # of the batches under way
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self.sizes: deque[int] = deque()  # images of each whole batch that was asked for

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Gives the images of a step, augmented, and their labels; of several ranks the share.

        Steps are asked for one after the other: those that follow may be made meanwhile.
        """
        spec = self.spec
        if step != self.next_step:
            self.sizes.clear()
            wanted = self._shares(batches_from(step, len(self.data), spec))
            self.batches = self.data.batches(wanted, spec)
        index, images = next(self.batches)
        self.next_step = step + 1
        self.ranks.take(self.sizes.popleft())
        return images, self.data.labels[index].to(spec.device)

    def _shares(self, batches: Iterable[Wanted]) -> Iterator[Wanted]:
        """Asks for this rank's share of batches, and notes how large they are as a whole."""
        for whole in batches:
            self.sizes.append(len(whole.index))
            yield whole._replace(share=self.ranks.share_of(len(whole.index)))

    def losses(self, images: Tensor, labels: Tensor, tape: RoutingTape) -> dict[str, Tensor]:
        """Computes the losses that the spec names."""
        return losses(self.model, images, labels, self.spec, tape, self.teacher, self.ranks)

    def validated(self, model: nn.Module) -> dict[str, float] | None:
        """Evaluates on the validation split: top-1 in percent, if there are classes, and loss."""
        if self.val is None:
            return None
        result = evaluate(model, self.val, self.spec, ranks=self.ranks)
        top1 = {} if result.top1 is None else {"val_top1": result.top1}
        return top1 | {"val_loss": result.loss}

    def after_update(self, tape: RoutingTape) -> None:
        """Moves the biases of routers that are balanced without a loss."""
        moe = self.spec.moe
        if moe is not None and moe.balance == "loss_free":
            for layer in tape.layers:
                update_choice_bias(layer.router, tape[layer], moe.bias_rate)


def fit(
    model: nn.Module,
    data: Split,
    val: Split | None,
    spec: RunSpec,
    checkpoint: Checkpoint | None = None,
    report: Callable[[dict], None] | None = None,
    teacher: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    ranks: One = ONE,
) -> tuple[nn.Module, Progress]:
    """Trains `model` in place as a run says; returns the model to evaluate (the weight average if
    `ema` is set) and its Progress.

    checkpoint: a file to resume from and to write to, deleted by the caller; None = none. report:
    called with each epoch's history row. teacher: the parent, where it is
    distilled. masks: of pruned weights, which stay zero. ranks: that train together, each of which
    calls this, with the same model; checkpoint and report are for rank 0. Randomness (order,
    augmentation, drop path, router noise) depends on `spec.seed` and the step, so that a resumed
    run ends with the same weights. Raises Diverged if the loss is not finite.
    """
    task = RunTask(model, data, val, spec, teacher, ranks)
    title = f"train {spec.id[:6]}"
    trainer = Trainer(model, task, spec.train, spec.seed, title, checkpoint, report, masks, ranks)
    trainer.run()
    return trainer.to_evaluate, trainer.progress


class Trainer:
    """One stage of training: a model, what moves its weights, and how far it has come.

    seed: of all that is drawn. title: of the progress bar. The other arguments are those of `fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        train: TrainSpec,
        seed: int,
        title: str,
        checkpoint: Checkpoint | None = None,
        report: Callable[[dict], None] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        ranks: One = ONE,
    ):
        self.model, self.task, self.train, self.ranks = model, task, train, ranks
        self.seed, self.title = seed, title
        self.checkpoint, self.report = checkpoint or Checkpoint(None), report
        self.masks = masks
        if train.trainable != "all":
            freeze(model, train.trainable)
        self.steps_per_epoch = task.steps_per_epoch
        self.steps = steps_in_all(train, self.steps_per_epoch)
        self.drop = None
        if train.single_expert_at:
            self.drop = ProgressiveDrop(model, self.steps, end=train.single_expert_at)
        self.optim = optimiser(model, train)
        self.schedule = schedule(self.optim, train, self.steps)
        self.average = None
        if train.ema is not None:
            self.average = ModelEmaV3(model, decay=train.ema, use_warmup=True)
        self.tape = RoutingTape(model)
        self.progress = Progress()
        self.recent_losses: list[float] = []

    @property
    def to_evaluate(self) -> nn.Module:
        """The weight average where there is one, else the model."""
        return self.model if self.average is None else self.average.module

    def run(self) -> None:
        """Trains to the end, from the checkpoint where there is one."""
        start = self._resume_alike()
        if start == 0 and (validated := self.task.validated(self.model)) is not None:
            self.progress.history.append({"epoch": 0.0} | validated)
        with torch.random.fork_rng(devices=[]), self._progress_bar(start) as bar:
            for step in range(start, self.steps):
                loss = self._step(step)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                done = step + 1
                if done % self.steps_per_epoch == 0 or done == self.steps:
                    self._end_epoch(done)
                if done < self.steps and self.checkpoint.due:
                    self.checkpoint.write({"step": done} | self._state())
        if self.drop is not None:
            self.drop.finish()

    def _step(self, step: int) -> float:
        """One update of the weights; returns its loss."""
        began = time.perf_counter()
        images, labels = self.task.batch(step)
        torch.manual_seed(mix(self.seed, NOISE, step))
        self.schedule.step_update(step + 1)
        self.model.train()
        parts = self.task.losses(images, labels, self.tape)
        loss = float(parts["loss"].detach())
        if not math.isfinite(loss):
            raise Diverged(step, self.recent_losses)
        self.optim.zero_grad(set_to_none=True)
        parts["loss"].backward()
        self.ranks.sum_gradients(self.model)
        if self.train.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optim.step()
        self._after_update(step)
        self.recent_losses = (self.recent_losses + [loss])[-LAST_LOSSES:]
        progress = self.progress
        for name, value in parts.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + float(value.detach())
        progress.seconds += time.perf_counter() - began
        progress.images += self.ranks.images_of_step(len(labels))
        add_to_curve(progress.curve, step, loss, every=max(1, self.steps // CURVE_POINTS))
        return loss

    def _after_update(self, step: int) -> None:
        """What follows each update: pruned weights back to zero, experts dropped, what the task
        asks for, the average taken."""
        if self.masks:
            apply_masks(self.model, self.masks)
        if self.drop is not None:
            self.drop.after(step, self.tape)
        self.task.after_update(self.tape)
        if self.average is not None:
            self.average.update(self.model, step=step)

    def _end_epoch(self, done: int) -> None:
        """Adds a row to the history; raises Diverged if the validation loss is not finite."""
        group = self.optim.param_groups[0]
        row = {
            "epoch": done / self.steps_per_epoch,
            "lr": group["lr"] / group.get("lr_scale", 1.0),
        }
        steps_in_epoch = (done - 1) % self.steps_per_epoch + 1
        sums = self.progress.sums
        row |= {f"train_{name}": total / steps_in_epoch for name, total in sums.items()}
        if (validated := self.task.validated(self.to_evaluate)) is not None:
            row |= validated
            # the last step may break the weights after a finite loss
            if not math.isfinite(row["val_loss"]):
                raise Diverged(done, self.recent_losses)
        self.progress.history.append(row)
        self.progress.sums = {}
        if self.report is not None:
            self.report(row)

    def _progress_bar(self, start: int) -> tqdm:
        return tqdm(
            total=self.steps,
            initial=start,
            unit="step",
            desc=self.title,
            leave=False,
            delay=5,
            mininterval=1.0,
            disable=self.ranks.rank > 0,
        )

    def _state(self) -> dict[str, Any]:
        """Everything that the next step depends on. Data order and noise follow from seed and step,
        so no generator state."""
        return {
            "model": self.model.state_dict(),
            "optim": self.optim.state_dict(),
            "progress": vars(self.progress),
            "average": None if self.average is None else self.average.module.state_dict(),
            "drop": None if self.drop is None else self.drop.state_dict(),
        }

    def _resume_alike(self) -> int:
        """Resumes on rank 0, and on the others from the state that it has then."""
        start = self._resume()
        if self.ranks.count > 1:
            start, state = self.ranks.from_first((start, self._state() if start else None))
            if state is not None and self.ranks.rank > 0:
                self._load(state)
        return start

    def _resume(self) -> int:
        """Loads the checkpoint into its owners; returns the step to go on from, 0 without one or
        where it does not fit."""
        state = self.checkpoint.read()
        if state is None:
            return 0
        untouched = copy.deepcopy(self._state())  # a load that fails half-way has changed weights
        try:
            self._check_step(state["step"])
            self._load(state)
        except Exception as error:  # each owner has its own kinds
            self._load(untouched)
            reason = " ".join(f"{type(error).__name__}: {error}".split())  # torch's has lines
            self.checkpoint.set_aside(f"does not fit the run ({reason})")
            return 0
        return state["step"]

    def _check_step(self, step: Any) -> None:
        """Raises ValueError for a step after which nothing is left to do, or that never was."""
        if not isinstance(step, int) or not 0 < step < self.steps:
            raise ValueError(f"it was written at step {step!r}, of {self.steps}")

    def _load(self, state: Mapping[str, Any]) -> None:
        """Loads a state, as `_state` gives it, into its owners."""
        if state["progress"].keys() != vars(self.progress).keys():
            raise ValueError(f"progress has the entries {', '.join(state['progress'])}")
        self.model.load_state_dict(state["model"])
        self.optim.load_state_dict(state["optim"])
        for parameter, moments in self.optim.state.items():
            for name, moment in moments.items():  # torch does not compare them
                if moment.dim() and moment.shape != parameter.shape:
                    raise ValueError(
                        f"{name} is of shape {tuple(moment.shape)}, its parameter of "
                        f"{tuple(parameter.shape)}"
                    )
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        if self.drop is not None:
            self.drop.load_state_dict(state["drop"])
        vars(self.progress).update(state["progress"])


# ---- small parts


def add_to_curve(curve: dict[str, list[float]], step: int, loss: float, every: int) -> None:
    """Adds a loss to the running means over windows of `every` steps; `step` is the last step of
    the window."""
    if step % every == 0:
        curve["step"].append(step + 1)
        curve["loss"].append(loss)
    else:
        losses_before = step % every
        curve["step"][-1] = step + 1
        curve["loss"][-1] += (loss - curve["loss"][-1]) / (losses_before + 1)
