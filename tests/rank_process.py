"""One rank of a test, started as a launcher starts it: python rank_process.py.

The runs are small ones whose every part may go wrong on several ranks: what is drawn, the last
batch, of one image, losses that are no means, what follows a step.
"""

from __future__ import annotations

import os
import signal

import torch

from lib.runs import together
from lib.spec import BackboneSpec, DataSpec, MaskSpec, MoESpec, RunSpec, TrainSpec
from lib.training import checkpoint, loop

STOP = 7  # the step, from 0, before which a run is broken off
BASE = RunSpec(
    data=DataSpec(train=65, val=20, test=30, augment="shift"),  # 5 steps an epoch
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2, drop_path=0.2),
    threads=1,
    keep=True,
    train=TrainSpec(
        epochs=2, batch=16, lr=1e-3, warmup=0.2, layer_decay=0.8, label_smoothing=0.1, clip=0.5
    ),
)
TOKEN = MoESpec(
    layers=2,
    experts=4,
    top_k=2,
    router="token",
    noise=1.0,
    shared=True,
    balance_weight=0.1,
    z_weight=1e-3,
)
IMAGE = MoESpec(
    layers=1,
    experts=4,
    router="image",
    balance="loss_free",
    noise=1.0,
    gate="renormalised",
    expert_dropout=0.3,
)
# Not with variation_weight, too: competing experts are used almost alike, and the variance of that
# is rounding. In one process a change of the first weights by 6e-8 of themselves grows to 4e-4.
COMPETING = TOKEN.but(noise=0.0, compete_rate=0.5, shared=False)
VARIED = TOKEN.but(balance="none", sharpness_weight=1e-2, variation_weight=1e-2)
PARENT = BASE.but(moe=TOKEN.but(shared=False))
SPECS = {
    "token": BASE.but(moe=TOKEN, train={"ema": 0.9, "epochs": 4}),
    "image": BASE.but(moe=IMAGE),
    "competing": BASE.but(moe=COMPETING),
    "varied": BASE.but(moe=VARIED),
    "ensemble": BASE.but(moe=TOKEN.but(members=2, top_k=1)),
    "one expert left": BASE.but(moe=TOKEN.but(top_k=1), train={"single_expert_at": 0.5}),
    "distilled": PARENT.but(
        init=PARENT,
        train={"distil": "probabilities", "distil_logits": 0.3, "distil_stream": 0.3},
    ),
    # a smaller rate: the gradient of a key bias is 0 but for rounding, which AdamW divides by its
    # own size, and without label smoothing and with a small loss that rounding is the larger part
    "masked": BASE.but(
        train={
            "mask": MaskSpec(width=16, depth=1, heads=2),
            "label_smoothing": 0.0,
            "layer_decay": 1.0,
            "lr": 1e-4,
        }
    ),
    # rank 0 trains it alone
    "capacity": BASE.but(moe=TOKEN.but(capacity_factor=1.0), train={"epochs": 1}),
}
RESUMED = SPECS["token"].but(seed=1)  # finds the checkpoint of one process
KILLED = SPECS["token"].but(seed=2)  # of which rank 1 is killed
NO_MEMORY = BASE.but(seed=3)  # for which the card of rank 1 is too small
DIVERGING = BASE.but(seed=4, train={"lr": 1e30, "clip": None})
FAILING = {"no memory": [NO_MEMORY], "diverging": [DIVERGING]}


def broken_off_at(seed: int, step: int, how):
    """Has `how` called at a step of the run of a seed, in the place of its losses."""
    steps, losses = [0], loop.losses

    def counted(model, images, labels, spec, *others):
        if spec.seed == seed:
            if steps[0] == step:
                how()
            steps[0] += 1
        return losses(model, images, labels, spec, *others)

    loop.losses = counted


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def main(rank: int) -> None:
    """Computes the runs, two that fail among them; then the ranks disagree; then rank 1 is killed
    in the middle of a run, which is saved after each step."""
    if rank == 1:
        broken_off_at(NO_MEMORY.seed, STOP, no_memory)
        broken_off_at(KILLED.seed, STOP, lambda: os.kill(os.getpid(), signal.SIGKILL))
    runs = FAILING | {name: [spec] for name, spec in SPECS.items()} | {"resumed": [RESUMED]}
    for grid in (runs, {"other": [BASE.but(seed=10 + rank)]}, {"killed": [KILLED]}):
        if KILLED in grid.get("killed", ()):
            checkpoint.CHECKPOINT_SECONDS, checkpoint.WRITE_SHARE = 0, 0
        try:
            together.collect(grid)
        except (RuntimeError, ValueError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main(int(os.environ["RANK"]))
