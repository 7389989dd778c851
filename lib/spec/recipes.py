"""Published methods whose training has stages, as runs that start from runs. What is varied, and
how far, is the notebook's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .channels import ChannelSpec
from .extraction import ExtractSpec
from .moe import options_without
from .run import RunSpec
from .training import MaskSpec


def pretrained(run: RunSpec, mask: MaskSpec, **train: object) -> RunSpec:
    """Masked pretraining of the model of `run`, from random weights; train: fields of its TrainSpec
    (2111.06377)."""
    return run.but(init=None, train={"mask": mask} | train)


def made_sparse(
    dense: RunSpec,
    gate_epochs: float,
    free_epochs: float,
    *,
    target: str = "choice",
    random_gate: bool = False,
) -> RunSpec:
    """From a mixture with all experts active to top-1 (Durham report, section 3): a new gate is
    trained alone towards the dense one, then everything. Returns the last run; the dense one stands
    at its root.

    target: what the gate is trained towards, besides the task: the dense gate's "choice", its
    "probabilities", or "none". random_gate: the dense gate is drawn anew before it teaches, and the
    experts are kept (our control).
    """
    teacher = dense.but(init=dense, fresh_routers=True, train=None) if random_gate else dense
    gate = dense.but(
        moe={"top_k": 1},
        init=teacher,
        fresh_routers=True,
        train={"epochs": gate_epochs, "trainable": "routers", "distil": target},
    )
    return gate.but(
        init=gate,
        fresh_routers=False,
        train={"epochs": free_epochs, "trainable": "all", "distil": "none"},
    )


def warmed_up(
    run: RunSpec, groups: Sequence[Sequence[int]], share: float, *, on_top: bool = False
) -> RunSpec:
    """`run` after a warm-up, in which each expert trains on the classes of its group alone (Leiden
    thesis, section 4).

    share: of the run's passes that the warm-up takes. on_top: as many passes come before those of
    the run, which keeps all of its own. What `run` prunes is cut before the warm-up.
    """
    epochs = run.train.epochs
    by_class = options_without("manual") | {
        "router": "manual",
        "groups": tuple(map(tuple, groups)),
        "balance": "none",
        "balance_weights": None,
        "z_weight": 0.0,
        "sharpness_weight": 0.0,
        "variation_weight": 0.0,
    }
    first = run.but(moe=by_class, train={"epochs": epochs * share})
    rest = epochs if on_top else epochs * (1 - share)
    return run.but(init=first, prune=None, train={"epochs": rest})


def dense_of(base: RunSpec) -> RunSpec:
    """Returns the run whose model experts are extracted from: the parent of `base`, else `base`."""
    return base.init or base


def extracted(
    base: RunSpec,
    rules: ExtractSpec,
    seed: int,
    changes: Sequence[Mapping[str, Any]] = (),
    *,
    epochs: float = 0.0,
    images: int | None = None,
    one_thread: bool = False,
) -> RunSpec:
    """Returns the run that extracts experts from the model of `dense_of(base)` (MoEE, 2505.15414).

    seed: draws calibration images and clusters. changes: of the rules, one after the other. epochs:
    of finetuning, which also learns from the dense model's logits, at a fifth of its learning rate;
    0 = none. images: training images of the finetuning, None = all. one_thread: see
    `_threads_of_one`; otherwise it takes those of the dense run.
    """
    start = dense_of(base)
    for change in changes:
        rules = rules.but(**change)
    run = start.but(
        study=base.study,
        init=start,
        extract=rules,
        train=None,
        seed=seed,
        threads=_threads_of_one(start) if one_thread else start.threads,
    )
    if not epochs:
        return run
    finetuning = start.train.but(epochs=epochs, lr=start.train.lr / 5, distil_logits=0.5)
    return run.but(train=finetuning, data={"train": images})


def distilled(run: RunSpec, epochs: float, stream: float, lr: float, layer_decay: float) -> RunSpec:
    """Returns an `extracted` run that then learns from the dense model alone, in bfloat16.

    epochs: of it, over all training images. stream: weight of the dense model's residual stream in
    the loss; the rest is that of its logits. lr: at its peak, of the head. layer_decay: factor of
    the rate from a layer to the one below it.
    """
    rates = {"lr": lr, "layer_decay": layer_decay}
    targets = {"distil_logits": 1.0, "distil_stream": stream}
    stage = run.init.train.but(epochs=epochs, **targets, **rates)
    return run.but(train=stage, dtype="bfloat16")


def with_channels(base: RunSpec, seed: int, **rules: object) -> RunSpec:
    """Returns the run that evaluates `dense_of(base)` with a part of its neurons (2602.15720).

    seed: orders the evaluated images, or draws training images. rules: fields of its ChannelSpec.
    On a processor it takes one thread.
    """
    start = dense_of(base)
    return start.but(
        study=base.study,
        init=start,
        channels=ChannelSpec(**rules),
        train=None,
        seed=seed,
        threads=_threads_of_one(start),
    )


def _threads_of_one(start: RunSpec) -> int:
    """Returns one on a processor, where two runs beat one of two threads; else those of `start`."""
    return 1 if start.device == "cpu" else start.threads
