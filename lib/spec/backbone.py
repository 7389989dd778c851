"""Describes the model that a run starts from."""

from __future__ import annotations

from pydantic import model_validator

from .base import Depth, FileName, FolderName, Share, Size, Spec


class BackboneSpec(Spec):
    """Describes a timm model and its starting weights."""

    name: FolderName = "vit_tiny_patch16_224"  # timm architecture
    # None = random | dinov2-s14-saliency | timm | file:NAME or pth:NAME@SHA256 in MOE_WEIGHTS
    weights: FileName | None = None
    patch: Size | None = None  # pixels; None = the architecture's own (as are the next three)
    width: Size | None = None  # D
    depth: Depth | None = None  # blocks
    heads: Size | None = None  # attention heads; must divide the width
    hidden: Size | None = None  # H of the MLPs
    # largest stochastic-depth rate; timm lets it grow linearly over the blocks
    drop_path: Share = 0.0

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.hidden and not self.width:
            raise ValueError(f"hidden={self.hidden} is set as a ratio to the width: set width, too")
        return self
