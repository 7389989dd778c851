"""Runs computed by several ranks together (`lib.training.ranks`), all started with one command:

    accelerate launch --num_processes 8 -m lib run PAGE --records

Rank 0 does what one process does: it alone knows the store, its locks, checkpoints and records,
prepares the model of a run, and measures it in the end. The others wait, and take part when it
trains: they get the model, and load the same images themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .. import paths
from ..inputs.sources import fingerprint_of
from ..spec import RunSpec
from ..training import loop, ranks
from ..training.checkpoint import Checkpoint
from .environment import code_hash

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..inputs.splits import Splits


def collect(grid: dict[str, list[RunSpec]]) -> bool:
    """Computes the runs of a grid that the store of rank 0 lacks, one after the other; returns
    whether this is rank 0, which has the records then.

    Every rank calls it. Raises what `collect.collect` does, on rank 0; on all ranks ValueError
    where they disagree on the runs or the code, and RuntimeError once one of them is gone.
    """
    try:
        return _collect(grid)
    except ranks.LostRank as error:
        raise RuntimeError(str(error)) from error


def _collect(grid: dict[str, list[RunSpec]]) -> bool:
    """`collect`, which LostRank ends."""
    from . import collect as runs

    with ranks.opened() as all_ranks:
        import torch

        ids = [spec.id for specs in grid.values() for spec in specs]
        all_ranks.agree(runs=ids, code=code_hash(), torch=torch.__version__)
        if all_ranks.rank > 0:
            _follow(all_ranks)
            return False
        try:
            runs.collect(grid)
        except Exception:
            all_ranks.from_first(None)  # the others end in order
            raise
        all_ranks.from_first(None)
        return True


def fit(
    model: nn.Module,
    splits: Splits,
    spec: RunSpec,
    checkpoint: Checkpoint,
    report: Callable[[dict], None] | None,
    teacher: nn.Module | None,
    masks: Mapping[str, Tensor],
    all_ranks: ranks.One,
) -> tuple[nn.Module, loop.Progress]:
    """Trains as `loop.fit` does, together with the other ranks, which wait in `collect`."""
    if all_ranks.count > 1:
        all_ranks.from_first((spec, model, teacher, masks))
    with all_ranks.taking_part():
        if all_ranks.count > 1:
            _prepare(all_ranks, spec, checkpoint.origin.get("data"))
        return loop.fit(
            model, splits.train, splits.val, spec, checkpoint, report, teacher, masks, all_ranks
        )


def _follow(all_ranks: ranks.Ranks) -> None:
    """Takes part in the runs that rank 0 trains, until it has no more."""
    from .execute import set_up

    while (invitation := all_ranks.from_first()) is not None:
        spec, model, teacher, masks = invitation
        try:
            with all_ranks.taking_part():
                set_up(spec)
                data = spec.data
                _prepare(all_ranks, spec, fingerprint_of(data.name, data.label, paths.data_home()))
                _train(all_ranks, spec, model, teacher, masks)
        except Exception as error:  # rank 0 files it
            what = f"{type(error).__name__}: {error}"
            print(f"rank {all_ranks.rank}, run {spec.id}: {what}", file=sys.stderr, flush=True)


def _train(
    all_ranks: ranks.Ranks,
    spec: RunSpec,
    model: nn.Module,
    teacher: nn.Module | None,
    masks: Mapping[str, Tensor],
) -> None:
    """Trains a model of rank 0's on this rank's share of the images."""
    from ..inputs.splits import load_splits
    from ..training.bfloat16 import products

    splits = load_splits(spec.data)
    masks = {name: mask.to(spec.device) for name, mask in masks.items()}
    teacher = None if teacher is None else teacher.to(spec.device)
    with products(spec):
        loop.fit(
            model.to(spec.device),
            splits.train,
            splits.val,
            spec,
            teacher=teacher,
            masks=masks,
            ranks=all_ranks,
        )


def _prepare(all_ranks: ranks.Ranks, spec: RunSpec, data: dict[str, Any] | None) -> None:
    """Chooses the device of this rank, and makes sure that all ranks have the same run before them.

    data: fingerprint of the data set, as it lies here.
    """
    if spec.device == "cuda":
        all_ranks.take_card()
    all_ranks.agree(run=spec.id, data=data)
