"""Published methods whose training has stages, as runs that start from runs. What is varied, and
how far, is the notebook's."""

from __future__ import annotations

from collections.abc import Sequence

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
    *,
    epochs: float = 0.0,
    images: int | None = None,
    threads: int | None = None,
) -> RunSpec:
    """Returns the run that extracts experts from the model of `dense_of(base)` (MoEE, 2505.15414).

    seed: draws calibration images and clusters. epochs: of finetuning, which also learns from the
    dense model's logits, at a fifth of its learning rate; 0 = none. images: training images of the
    finetuning, None = all. threads: of torch, None = those of the dense run.
    """
    start = dense_of(base)
    run = start.but(
        study=base.study,
        init=start,
        extract=rules,
        train=None,
        seed=seed,
        threads=threads or start.threads,
    )
    if not epochs:
        return run
    finetuning = start.train.but(epochs=epochs, lr=start.train.lr / 5, distil_logits=0.5)
    return run.but(train=finetuning, data={"train": images})


def with_channels(base: RunSpec, seed: int, **rules: object) -> RunSpec:
    """Returns the run that evaluates `dense_of(base)` with a part of its neurons (2602.15720).

    seed: orders the evaluated images, or draws training images. rules: fields of its ChannelSpec.
    On a processor it takes one thread, since two such runs beat one of two threads.
    """
    start = dense_of(base)
    return start.but(
        study=base.study,
        init=start,
        channels=ChannelSpec(**rules),
        train=None,
        seed=seed,
        threads=1 if start.device == "cpu" else start.threads,
    )
