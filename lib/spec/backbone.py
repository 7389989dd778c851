"""Describes the model that a run starts from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from .base import Depth, FileName, FolderName, Share, Size, Spec


class BackboneSpec(Spec):
    """Describes a timm model and its starting weights."""

    name: FolderName = "vit_tiny_patch16_224"  # timm architecture
    # None = random | dinov2-s14-saliency | timm | in MOE_WEIGHTS: file:NAME, pth:NAME@SHA256,
    # satmae:NAME@SHA256, vmoe:PREFIX@SHA256
    weights: FileName | None = None
    # rows and columns of the position embeddings in a file, where its weights do not say
    grid: Annotated[tuple[Size, Size], Field(strict=False)] | None = None
    patch: Size | None = None  # pixels; None = the architecture's own (as are the next three)
    width: Size | None = None  # D
    depth: Depth | None = None  # blocks
    heads: Size | None = None  # attention heads; must divide the width
    hidden: Size | None = None  # H of the MLPs
    # largest stochastic-depth rate; timm lets it grow linearly over the blocks
    drop_path: Share = 0.0

    @model_validator(mode="after")
    def _consistent(self):
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.hidden and not self.width:
            raise ValueError(f"hidden={self.hidden} is set as a ratio to the width: set width, too")
        if self.grid is not None and not self.from_file:
            raise ValueError(
                f"grid={self.grid} is of the positions in a weight file; weights={self.weights!r} "
                "is none: leave it at None, or name a file (file:NAME, pth:NAME@SHA256, "
                "satmae:NAME@SHA256, vmoe:PREFIX@SHA256)"
            )
        return self

    @property
    def from_file(self) -> bool:
        """Says whether the weights are read from a file that the user has put there."""
        return (self.weights or "").startswith(("file:", "pth:", "satmae:", "vmoe:"))

    @property
    def brings_experts(self) -> bool:
        """Says whether the weights are of a model that has MoE layers already."""
        return (self.weights or "").startswith("vmoe:")
