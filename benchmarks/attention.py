"""Times a training step of a dense ViT-S/14 in bfloat16 autocast, with torch's fused attention and
with attention written out."""

from __future__ import annotations

import copy

import timm
import torch
from torch import nn

from lib.measure.timing import compare
from lib.models.backbone import write_out_attention

NAME, SIDE, BATCH = "vit_small_patch14_dinov2", 56, 32


def step_ms(repeats: int = 20) -> dict[str, float]:
    """Times forward and backward of "fused" and "written out" in turn; returns medians in ms."""
    fused = timm.create_model(NAME, img_size=SIDE, num_classes=100).train()
    written = copy.deepcopy(fused)
    write_out_attention(written)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def step(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images)
        out.float().logsumexp(dim=-1).mean().backward()
        model.zero_grad(set_to_none=True)

    timed = compare({"fused": lambda: step(fused), "written out": lambda: step(written)}, repeats)
    return {name: time.median for name, time in timed.items()}
