"""Evaluation: one pass over a split for accuracy, loss and predictions, with the routings on the
way.

Axis letters: **B** images.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..inputs.splits import Split, Wanted
from ..models.mae import MaskedAutoencoder
from ..models.moe import RoutingTape
from ..models.upcycle import block_mlps
from ..routers.base import Routing
from ..routers.manual import labelled
from ..spec import RunSpec
from .losses import autocast
from .ranks import ONE, One

BATCH = 250  # images that are evaluated at a time

# Takes the routings of a batch, shallow to deep, the blocks that they stand in, and (B,) labels.
OnRoutings = Callable[[Sequence[Routing], Sequence[int], Tensor], None]


@dataclass
class Evaluation:
    """Mean top-1 (percent) and cross-entropy (nats) over n images, with (n,) predicted classes.

    Of a masked autoencoder: the reconstruction loss alone, the other two are None.
    """

    n: int
    top1: float | None
    loss: float
    predictions: Tensor | None
    images_per_s: float

    @property
    def entry(self) -> dict[str, float]:
        """Its entry in a record: n, top1 where there is one, and loss."""
        top1 = {} if self.top1 is None else {"top1": self.top1}
        return {"n": self.n} | top1 | {"loss": self.loss}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    spec: RunSpec,
    on_routings: OnRoutings | None = None,
    batch: int = BATCH,
    ranks: One = ONE,
) -> Evaluation:
    """Evaluates a model on a split, without augmentation.

    on_routings: is called with the routings of each batch, of an ensemble with labels once a
    member. Where a batch chooses the neurons (spec.channels), it is one of `batches_that_choose`;
    predictions are in the order of the split all the same. ranks: that share the batches out, each
    of which calls this, without on_routings; all get the whole result.
    """
    model.eval()
    tape, blocks = RoutingTape(model), moe_blocks(model)
    watched = on_routings is not None and bool(blocks)
    # Hidden patches of an evaluation are the same at every epoch, so that its losses can be
    # compared.
    masks = torch.Generator().manual_seed(0) if isinstance(model, MaskedAutoencoder) else None
    if masks is not None:
        ranks = ONE  # one generator for all batches: each rank does them all
    batches = torch.arange(len(split)).split(batch)
    if spec.channels is not None and spec.channels.pool == "batch":
        batches = batches_that_choose(split.labels, spec)
    predictions, losses, seconds = [], [], 0.0
    with _progress_bar(len(split), spec, ranks) as bar:
        for index, images in split.batches(map(Wanted, ranks.turns(batches)), spec):
            labels = split.labels[index]
            began = time.perf_counter()
            with (
                tape if watched else contextlib.nullcontext(),
                autocast(spec),
                labelled(model, labels.to(spec.device)),
            ):
                out = model(images) if masks is None else model(images, masks)
            seconds += time.perf_counter() - began
            if watched:
                routings = tape.routings()
                members = routings[0].shape[0] // len(labels)
                on_routings(routings, blocks, labels.repeat(members))
            bar.update(len(index))
            if masks is not None:
                losses.append(out.loss.item() * len(index))
                continue
            logits = out.float().cpu()
            losses.append(F.cross_entropy(logits, labels, reduction="sum").item())
            predictions.append(logits.argmax(dim=-1).to(whole_type(logits.shape[-1], torch.int16)))
    losses, predictions = ranks.in_order(losses), ranks.in_order(predictions)
    loss, images_per_s = math.fsum(losses) / len(split), len(split) / max(seconds, 1e-9)
    if masks is not None:
        return Evaluation(len(split), None, loss, None, images_per_s)
    predicted = torch.cat(predictions)[torch.cat(batches).argsort()]
    correct = (predicted == split.labels).double().mean().item()
    return Evaluation(len(split), 100 * correct, loss, predicted, images_per_s)


def batches_that_choose(labels: Tensor, spec: RunSpec) -> tuple[Tensor, ...]:
    """Splits the images of a split, by number, into the batches that `spec.channels` asks for.

    labels: (B,). The seed of the run shuffles the images; in the order of classes those of a class.
    The last batch is what is left.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(spec.seed))
    if spec.channels.order == "class":
        order = order[labels[order].argsort(stable=True)]
    return order.split(spec.channels.batch)


def whole_type(count: int, smallest: torch.dtype = torch.int8) -> torch.dtype:
    """Chooses the smallest signed type, from `smallest` on, that holds -1 and 0..count - 1."""
    types = (torch.int8, torch.int16, torch.int32, torch.int64)
    return next(t for t in types[types.index(smallest) :] if count - 1 <= torch.iinfo(t).max)


def _progress_bar(images: int, spec: RunSpec, ranks: One) -> tqdm:
    return tqdm(
        total=images,
        unit="image",
        desc=f"evaluate {spec.id[:6]}",
        leave=False,
        delay=5,
        mininterval=1.0,
        disable=ranks.rank > 0,
    )


def moe_blocks(model: nn.Module) -> list[int]:
    """Returns the index of the block that each MoE layer stands in, counted from 0 over all blocks,
    from input to output."""
    names = [name for name, _ in block_mlps(model)]
    return [names.index(name) for name in RoutingTape(model).layers.values()]
