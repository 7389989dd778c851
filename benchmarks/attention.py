"""Times a training step of a dense ViT-S/14 in bfloat16 autocast, with torch's fused attention and
with attention written out."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import timm
import torch

from lib.models.backbone import write_out_attention
from lib.verdicts.speed import Ratio

from .clock import forward_backward, timed

NAME, SIDE, BATCH = "vit_small_patch14_dinov2", 56, 32


def rows(repeats: int) -> Iterator[Ratio]:
    """Times forward and backward of both in turn; above 1 writing out is right here."""
    fused = timm.create_model(NAME, img_size=SIDE, num_classes=100).train()
    written_out = copy.deepcopy(fused)
    write_out_attention(written_out)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    models = {"fused": fused, "written out": written_out}
    calls = {name: forward_backward(model, images, "autocast") for name, model in models.items()}
    times = timed(calls, repeats)
    yield Ratio(
        part="other",
        what="attention, forward+backward",
        shape=f"ViT-S/14, {SIDE} px, batch {BATCH}",
        dtype="autocast",
        ours_is="written out",
        against="fused",
        ours=times["written out"],
        other=times["fused"],
    )
