"""Times the reading of JPEG files, by processes that read ahead, against decoded images.

`python -m benchmarks.inputs` prints this table alone: images a second, and what a training step
takes beside one of a bare loop over decoded tensors.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from lib.inputs.loading import VARIABLE
from lib.inputs.rows import picture, rows_in_files
from lib.inputs.sources import Source
from lib.inputs.splits import Split, Wanted
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec
from lib.training.loop import fit
from lib.verdicts.speed import Ratio

from .clock import summary
from .trainer import CLASSES, GOAL, DecodedImages, bare

NAME, SIDE = "vit_small_patch16_224", 224
PROCESSES = (0, 1, 2)
# The first half of a pass is not timed: processes fill meanwhile what they read ahead.
BATCH, STEPS = 16, 16  # reading, and beside a card
MODEL_BATCH, MODEL_STEPS = 4, 8  # of the model on the processor, which takes longer
CARD_SECONDS = 0.1  # a step of BATCH images on the stand-in for a card: 160 images a second
DECODED = "decoded tensors"


class Files(NamedTuple):
    """Says how pictures are stored, height and width, and by which augmentation they are read."""

    height: int
    width: int
    augment: str

    def __str__(self) -> str:
        return f"JPEG {self.height} x {self.width}, {self.augment}"


def rows(repeats: int) -> Iterator[Ratio]:
    """Times reading alone, then training, on files that are written to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        for files in (Files(SIDE, SIDE, "flip"), Files(375, 500, "resized_crop")):
            split = _split(Path(folder) / files.augment, files)
            run = _run(files, BATCH)
            yield from _rows("reading a batch", files, run, _passes(split, run), repeats)
            if files.augment == "flip":
                passes = _fits(split, run, _Card(), STEPS)
                yield from _rows("a step beside a card", files, run, passes, repeats, GOAL)
                run = _run(files, MODEL_BATCH)
                model = timm.create_model(NAME, img_size=SIDE, num_classes=CLASSES)
                passes = _fits(split, run, model, MODEL_STEPS)
                fewer = max(3, repeats // 2)
                yield from _rows("a step of ViT-S/16", files, run, passes, fewer, GOAL)


def _rows(
    what: str,
    files: Files,
    run: RunSpec,
    passes: dict[str, Callable[[], float]],
    repeats: int,
    goal: float | None = None,
) -> Iterator[Ratio]:
    """Carries the passes out in turn; each gives its seconds a batch.

    goal: of the largest number of processes.
    """
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1):  # the first round warms up
        for name, one_pass in passes.items():
            seconds = one_pass()
            if turn:
                times[name].append(1e3 * seconds)
    summaries = {name: summary(values) for name, values in times.items()}
    rates = {name: 1e3 * run.train.batch / time.median for name, time in summaries.items()}
    for count in PROCESSES:
        name = _name(count)
        yield Ratio(
            part="other",
            what=what,
            shape=f"{files}, batch {run.train.batch}",
            dtype="fp32",
            ours_is=name,
            against=DECODED,
            ours=summaries[name],
            other=summaries[DECODED],
            goal=goal if count == max(PROCESSES) else None,
            note=f"{rates[name]:,.0f} images/s, {DECODED} {rates[DECODED]:,.0f}",
        )


def _name(count: int) -> str:
    return f"{count} process" + ("es" if count != 1 else "")


# ---------------------------------------------------------------- what is timed


def _passes(split: Split, run: RunSpec) -> dict[str, Callable[[], float]]:
    """Makes passes that read batches and do nothing with them."""
    decoded = DecodedImages(STEPS * BATCH, SIDE)

    def wanted() -> Iterator[Wanted]:
        for step, index in enumerate(torch.arange(STEPS * BATCH).split(BATCH)):
            yield Wanted(index, torch.Generator().manual_seed(step))

    def read(data: Split | DecodedImages, count: int) -> float:
        clock = _Clock(data)
        with _processes(count):
            for _ in clock.batches(wanted(), run):
                pass
        return clock.seconds

    passes = {DECODED: lambda: read(decoded, 0)}
    return passes | {_name(n): lambda n=n: read(split, n) for n in PROCESSES}


def _fits(
    split: Split, run: RunSpec, model: nn.Module, steps: int
) -> dict[str, Callable[[], float]]:
    """Makes passes that train: by a bare loop over decoded images, and by the trainer."""
    count = steps * run.train.batch
    split = Split(split.source, split.rows[:count], split.labels[:count])
    decoded = DecodedImages(count, SIDE)

    def by_hand() -> float:
        clock = _Clock(decoded)
        bare(model, clock, run, steps)
        return clock.seconds

    def by_trainer(processes: int) -> float:
        clock = _Clock(split)
        with _processes(processes):
            fit(model, clock, None, run)
        return clock.seconds

    return {DECODED: by_hand} | {_name(n): lambda n=n: by_trainer(n) for n in PROCESSES}


@dataclass
class _Clock:
    """Passes batches of images on, and notes when each is asked for."""

    data: Split | DecodedImages
    asked: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def labels(self) -> Tensor:
        return self.data.labels

    @property
    def seconds(self) -> float:
        """The mean from one request to the next, over the second half of them."""
        half = self.asked[len(self.asked) // 2 :]
        return (half[-1] - half[0]) / (len(half) - 1)

    def batch(self, index: Tensor, run: RunSpec) -> Tensor:
        self.asked.append(time.perf_counter())
        return self.data.batch(index, run)

    def batches(self, wanted: Iterable[Wanted], run: RunSpec) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.data.batches(wanted, run)
        while True:
            self.asked.append(time.perf_counter())
            if (item := next(batches, None)) is None:
                return
            yield item


class _Card(nn.Module):
    """Stands in for a card: a step takes it CARD_SECONDS, in which the processor waits."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(CARD_SECONDS)
        return self.head(images.mean(dim=(2, 3)))


# ---------------------------------------------------------------- what is read


class _ReadAnew(Source):
    """A source of which nothing stays decoded in memory, as of one that is too large."""

    def image(self, row: int) -> Tensor:
        return self._decode(row)


def _split(folder: Path, files: Files) -> Split:
    """Writes pictures, smooth with some noise: as many bytes as photographs of that size have."""
    folder.mkdir()
    numbers, paths = np.random.default_rng(0), []
    for i in range(STEPS * BATCH):
        coarse = Image.fromarray(numbers.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((files.width, files.height), Image.BICUBIC), dtype=int)
        noisy = smooth + numbers.integers(-6, 7, smooth.shape)
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    stored = rows_in_files(np.arange(len(paths)) % CLASSES, paths, picture)
    source = _ReadAnew(stored.labels, stored.decode, 3, stored.stored, stored.job)
    return Split(source, np.arange(len(paths)), torch.from_numpy(stored.labels))


def _run(files: Files, batch: int) -> RunSpec:
    return RunSpec(
        data=DataSpec(image_size=SIDE, augment=files.augment),
        backbone=BackboneSpec(name=NAME),
        threads=torch.get_num_threads(),
        train=TrainSpec(epochs=1.0, batch=batch),
    )


@contextmanager
def _processes(count: int) -> Iterator[None]:
    """Asks for a number of processes that read."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(count)
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def main() -> None:
    from .__main__ import HEAD, line  # it imports this module

    options = argparse.ArgumentParser(prog="python -m benchmarks.inputs", description=__doc__)
    options.add_argument("--repeats", type=int, default=20, help="interleaved passes (default: 20)")
    repeats = options.parse_args().repeats
    if repeats < 3:
        options.error(f"--repeats {repeats} gives no median and quantile: at least 3")
    print(f"threads: {torch.get_num_threads()}, load average: {os.getloadavg()[0]:.1f}")
    print(HEAD)
    for row in rows(repeats):
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
