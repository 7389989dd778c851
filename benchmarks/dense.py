"""Computes the rows of an MoE layer with dense MLPs, plain and packed: the bound of the layer.

Bound: the faster of (a) one MLP on all K*T rows and (b) the same rows in E equal contiguous chunks
with E different MLPs. At a ratio of 1 routing costs nothing. Packed: each weight lies in memory as
oneDNN multiplies it, once for all calls, and the activation is fused with the product; plain
weights are packed anew in every call, which in bfloat16 costs more than the product of few rows.

Axis letters: **T** tokens, **D** width, **H** hidden width, **E** experts, **K** experts a token.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn


class OneMlp(nn.Module):
    """Applies one MLP to each token K times: bound (a). (T, D) -> (K T, D)."""

    def __init__(self, width: int, hidden: int, top_k: int):
        super().__init__()
        self.mlp, self.top_k = Mlp(width, hidden), top_k

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.repeat(self.top_k, 1) if self.top_k > 1 else x)


class EqualChunks(nn.Module):
    """Applies E MLPs to equal contiguous chunks of the K*T rows: bound (b). (T, D) -> (K T, D)."""

    def __init__(self, width: int, hidden: int, experts: int, top_k: int):
        super().__init__()
        self.mlps, self.top_k = nn.ModuleList(Mlp(width, hidden) for _ in range(experts)), top_k

    def forward(self, x: Tensor) -> Tensor:
        rows = x.repeat(self.top_k, 1) if self.top_k > 1 else x
        chunks = rows.tensor_split(len(self.mlps))
        return torch.cat([mlp(chunk) for mlp, chunk in zip(self.mlps, chunks, strict=True)])


class PackedMlp(nn.Module):
    """Computes what an MLP with GELU does, without gradients, with weights packed once.

    rows: how many rows a call has, for which the packing is chosen.
    """

    def __init__(self, mlp: Mlp, rows: int):
        super().__init__()
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.w1, self.w2 = (pack(fc.weight.detach(), rows) for fc in (mlp.fc1, mlp.fc2))
        self.b1, self.b2 = mlp.fc1.bias.detach(), mlp.fc2.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        hidden = product(x, self.w1, self.b1, "gelu", [], "none")
        return product(hidden, self.w2, self.b2, "none", [], "")


def packed(bound: OneMlp | EqualChunks, tokens: int) -> nn.Module:
    """Copies a bound with packed weights. tokens: T of a call."""
    if isinstance(bound, OneMlp):
        out = OneMlp(1, 1, bound.top_k)
        out.mlp = PackedMlp(bound.mlp, tokens * bound.top_k)
        return out
    out = EqualChunks(1, 1, 1, bound.top_k)
    rows = tokens * bound.top_k // len(bound.mlps)
    out.mlps = nn.ModuleList(PackedMlp(mlp, rows) for mlp in bound.mlps)
    return out
