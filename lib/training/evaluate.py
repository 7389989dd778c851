"""One pass over a split: accuracy, loss, predictions, and the routings on the way."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..inputs.splits import Split
from ..models.mae import MaskedAutoencoder
from ..models.moe import RoutingTape
from ..models.upcycle import block_mlps
from ..routers.manual import labelled
from ..spec import RunSpec
from .losses import autocast

if TYPE_CHECKING:  # a probe is handed in; evaluation knows no measure
    from ..measure.routing import RoutingProbe


@dataclass
class Evaluation:
    """Mean top-1 (percent) and cross-entropy (nats) over n images, with predictions (n,) as int16.

    Of a masked autoencoder: the reconstruction loss alone, the other two are None.
    """

    n: int
    top1: float | None
    loss: float
    predictions: Tensor | None
    images_per_s: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    spec: RunSpec,
    probe: RoutingProbe | None = None,
    batch: int = 250,
) -> Evaluation:
    """One pass over a split without augmentation; hands each batch's routings to `probe`."""
    model.eval()
    tape, blocks = RoutingTape(model), moe_blocks(model)
    # Hidden patches of an evaluation are the same at every epoch, so that its losses can be
    # compared.
    masks = torch.Generator().manual_seed(0) if isinstance(model, MaskedAutoencoder) else None
    guesses, losses, seconds = [], [], 0.0
    bar = tqdm(
        total=len(split),
        unit="image",
        desc=f"evaluate {spec.id[:6]}",
        leave=False,
        delay=5,
        mininterval=1.0,
    )
    with bar:
        for index in torch.arange(len(split)).split(batch):
            images = split.batch(index, spec.data).to(spec.device)
            began = time.perf_counter()
            labels = split.labels[index]
            with (
                tape if probe is not None else contextlib.nullcontext(),
                autocast(spec),
                labelled(model, labels.to(spec.device)),
            ):
                out = model(images) if masks is None else model(images, masks)
            seconds += time.perf_counter() - began
            if probe is not None and blocks:
                routings = tape.routings()
                probe.update(
                    routings, blocks, labels.repeat(routings[0].shape[0] // len(labels))
                )  # once for each member
            bar.update(len(index))
            if masks is not None:
                losses.append(out.loss.item() * len(index))
                continue
            logits = out.float().cpu()
            losses.append(F.cross_entropy(logits, labels, reduction="sum").item())
            guesses.append(logits.argmax(dim=-1).to(torch.int16))
    loss, rate = math.fsum(losses) / len(split), len(split) / seconds
    if masks is not None:
        return Evaluation(len(split), None, loss, None, rate)
    predictions = torch.cat(guesses)
    right = (predictions == split.labels).double().mean().item()
    return Evaluation(len(split), 100 * right, loss, predictions, rate)


def moe_blocks(model: nn.Module) -> list[int]:
    """Index of the block that each MoE layer stands in, counted from 0 over all blocks, from input
    to output."""
    names = [name for name, _ in block_mlps(model)]
    return [names.index(name) for name in RoutingTape(model).layers.values()]
