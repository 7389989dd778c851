"""Times the trainer against a bare timm loop: same model, batches, optimiser settings, clipping and
loss, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from lib.inputs.splits import Wanted
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec
from lib.training.loop import fit
from lib.verdicts.speed import Ratio

from .clock import summary

GOAL = 1 / 1.05  # at most 5% of extra time
NAME, SIDE, CLASSES, BATCH = "vit_small_patch14_dinov2", 56, 100, 32


class DecodedImages:
    """Stands in for `lib.inputs.splits.Split` with decoded images: the loop alone is measured."""

    def __init__(self, count: int, side: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, side, side, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, index: Tensor, spec: DataSpec, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.images[index]

    def batches(self, wanted: Iterable[Wanted], run: RunSpec) -> Iterator[tuple[Tensor, Tensor]]:
        return ((index, self.batch(index, run.data)) for index, *_ in wanted)


def rows(repeats: int, steps: int = 4) -> Iterator[Ratio]:
    """Trains a dense ViT-S/14 at 56 px for `steps` steps with each loop in turn, `repeats` times
    after one that warms up."""
    data = DecodedImages(steps * BATCH, SIDE)
    spec = RunSpec(
        data=DataSpec(image_size=SIDE),
        backbone=BackboneSpec(name=NAME),
        threads=torch.get_num_threads(),
        train=TrainSpec(epochs=1.0, batch=BATCH, layer_decay=0.65),
    )
    model = timm.create_model(NAME, img_size=SIDE, num_classes=CLASSES)
    times: dict[str, list[float]] = {"bare": [], "trainer": []}
    loops = {
        "bare": lambda: bare(model, data, spec, steps),
        "trainer": lambda: fit(model, data, None, spec),
    }
    # the first round warms up
    for turn in range(repeats + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    yield Ratio(
        part="other",
        what=f"training, {steps} steps",
        shape=f"ViT-S/14, {SIDE} px, batch {BATCH}",
        dtype="fp32",
        ours_is="lib.training.loop",
        against="bare timm loop",
        ours=summary(times["trainer"]),
        other=summary(times["bare"]),
        goal=GOAL,
    )


def bare(model: nn.Module, data: DecodedImages, spec: RunSpec, steps: int) -> None:
    """Trains by a loop of timm's parts."""
    train = spec.train
    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=train.lr,
        weight_decay=train.weight_decay,
        layer_decay=None if train.layer_decay == 1 else train.layer_decay,
        fused=True,
    )
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=round(train.warmup * steps), t_in_epochs=False
    )
    model.train()
    for step, index in enumerate(torch.randperm(len(data)).split(train.batch)):
        schedule.step_update(step)
        logits = model(data.batch(index, spec))
        loss = F.cross_entropy(logits, data.labels[index], label_smoothing=train.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), train.clip)
        optimizer.step()
