"""Masked-autoencoder pretraining around a timm ViT (MAE, He et al. 2022, 2111.06377).

The encoder sees the class token and the patches that are not hidden. A small decoder gets its
output, a mask token in each hidden place and fixed positions, and predicts pixels. MoE layers in
the encoder route visible tokens only.

Axis letters: **B** images, **P** patches of an image, **V** visible ones, **C** channels, **S**
patch side, **D** width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..spec import MaskSpec


@dataclass(frozen=True)
class Reconstruction:
    """loss: mean squared error on hidden patches, on pixels normalised by patch; prediction: (B, P,
    S*S*C) in that scale; hidden: (B, P) bool."""

    loss: Tensor
    prediction: Tensor
    hidden: Tensor


class MaskedAutoencoder(nn.Module):
    """encoder: a timm VisionTransformer with class token and absolute positions; its head is not
    used.

    Raises ValueError for other models: hiding patches needs a sequence that can be shortened.
    """

    def __init__(self, encoder: nn.Module, mask: MaskSpec):
        super().__init__()
        if (
            not isinstance(encoder, VisionTransformer)
            or encoder.pos_embed is None
            or not encoder.num_prefix_tokens
        ):
            raise ValueError(
                f"{type(encoder).__name__} cannot be pretrained with masks: a timm "
                "VisionTransformer with class "
                "token and absolute position embeddings can"
            )
        self.encoder, self.ratio = encoder, mask.ratio
        grid = encoder.patch_embed.grid_size
        self.side, self.channels = (
            encoder.patch_embed.patch_size[0],
            encoder.patch_embed.proj.in_channels,
        )
        self.embed = nn.Linear(encoder.embed_dim, mask.width)
        self.token = nn.Parameter(torch.zeros(1, 1, mask.width))
        nn.init.normal_(self.token, std=0.02)
        fixed = build_sincos2d_pos_embed(list(grid), dim=mask.width, interleave_sin_cos=False)
        self.register_buffer(
            "positions",
            torch.cat([torch.zeros(encoder.num_prefix_tokens, mask.width), fixed]).unsqueeze(0),
        )
        self.blocks = nn.Sequential(
            *[Block(mask.width, mask.heads, qkv_bias=True) for _ in range(mask.depth)]
        )
        self.norm = nn.LayerNorm(mask.width)
        self.predict = nn.Linear(mask.width, self.side**2 * self.channels)

    def no_weight_decay(self) -> set[str]:
        """Names that weight decay leaves alone, as timm asks for them."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"token"}

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """images: (B, C, h, w) as the encoder takes them. generator: of the hidden patches; the
        global one if None."""
        target = self.patches(images)
        b, count, _ = target.shape
        order = torch.rand(b, count, generator=generator).argsort(dim=1).to(images.device)
        visible = order[:, : max(1, round(count * (1 - self.ratio)))].sort(dim=1).values
        hidden = torch.ones(b, count, dtype=torch.bool, device=images.device).scatter_(
            1, visible, False
        )
        prediction = self.decode(self.encode(images, visible), visible, count)
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        error = (prediction.float() - (target - mean) / (var + 1e-6).sqrt()).square().mean(dim=-1)
        return Reconstruction(error[hidden].mean(), prediction, hidden)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """visible: (B, V) patch indices -> (B, prefix + V, D) normed tokens."""
        encoder, prefix = self.encoder, self.encoder.num_prefix_tokens
        # timm models without a position for the class token hold one row a patch; the others hold
        # the prefix rows first
        held = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
        x = encoder.patch_embed(images) + encoder.pos_embed[:, held:]
        x = x.gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        parts = [encoder.cls_token] + ([encoder.reg_token] if encoder.reg_token is not None else [])
        first = torch.cat(parts, dim=1)
        first = first + encoder.pos_embed[:, :held] if held == prefix else first
        x = encoder.norm_pre(torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1))
        return encoder.norm(encoder.blocks(x))

    def decode(self, tokens: Tensor, visible: Tensor, count: int) -> Tensor:
        """tokens: (B, prefix + V, D) -> (B, P, S*S*C) predictions for every patch, hidden or "
        "not."""
        prefix = self.encoder.num_prefix_tokens
        x = self.embed(tokens)
        full = self.token.to(x.dtype).expand(x.shape[0], count, -1)
        full = full.scatter(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, prefix:])
        x = torch.cat([x[:, :prefix], full], dim=1) + self.positions.to(x.dtype)
        return self.predict(self.norm(self.blocks(x)))[:, prefix:]

    def patches(self, images: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, P, S*S*C), rows of patches from the top left."""
        s = self.side
        return nn.functional.unfold(images.float(), s, stride=s).transpose(1, 2)

    def picture(self, images: Tensor, out: Reconstruction) -> Tensor:
        """(B, C, h, w) images whose hidden patches are the predicted ones, in the scale of the
        input."""
        target = self.patches(images)
        scale = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        filled = out.prediction.float() * scale + target.mean(dim=-1, keepdim=True)
        rows = torch.where(out.hidden.unsqueeze(-1), filled, target).transpose(1, 2)
        return nn.functional.fold(rows, images.shape[-2:], self.side, stride=self.side)
