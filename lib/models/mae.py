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
from .tokens import has_class_token


@dataclass(frozen=True)
class Reconstruction:
    """Holds the loss of a batch and what was predicted for its patches."""

    loss: Tensor  # mean squared error on hidden patches, on pixels normalised by patch
    prediction: Tensor  # (B, P, S*S*C), in the scale of the normalised pixels
    hidden: Tensor  # (B, P) bool


class MaskedAutoencoder(nn.Module):
    """Adds a small decoder to an encoder, and learns to predict the patches that are hidden.

    encoder: a timm VisionTransformer with class token and absolute positions; its head is not
    used. Raises ValueError for other models: hiding patches needs a sequence that can be shortened.
    """

    def __init__(self, encoder: nn.Module, mask: MaskSpec):
        super().__init__()
        if (
            not isinstance(encoder, VisionTransformer)
            or encoder.pos_embed is None
            or not has_class_token(encoder)
        ):
            raise ValueError(
                f"{type(encoder).__name__} cannot be pretrained with masks: a timm "
                "VisionTransformer with class token and absolute position embeddings can"
            )
        self.encoder, self.ratio = encoder, mask.ratio
        grid = encoder.patch_embed.grid_size
        patches = grid[0] * grid[1]
        if self.visible_patches(patches) == patches:
            raise ValueError(
                f"mask ratio={mask.ratio} hides none of {patches} patches: give more, or smaller "
                "patches"
            )
        self.side = encoder.patch_embed.patch_size[0]
        self.channels = encoder.patch_embed.proj.in_channels
        self.embed = nn.Linear(encoder.embed_dim, mask.width)
        self.token = nn.Parameter(torch.zeros(1, 1, mask.width))
        nn.init.normal_(self.token, std=0.02)
        patches = build_sincos2d_pos_embed(list(grid), dim=mask.width, interleave_sin_cos=False)
        # Class and register tokens have no place in the image: their rows are zero.
        prefix = torch.zeros(encoder.num_prefix_tokens, mask.width)
        self.register_buffer("positions", torch.cat([prefix, patches]).unsqueeze(0))
        self.blocks = nn.Sequential(
            *[Block(mask.width, mask.heads, qkv_bias=True) for _ in range(mask.depth)]
        )
        self.norm = nn.LayerNorm(mask.width)
        self.predict = nn.Linear(mask.width, self.side**2 * self.channels)
        self.train(encoder.training)

    def visible_patches(self, patches: int) -> int:
        """Computes V: of so many patches those that are not hidden, at least one."""
        return max(1, round(patches * (1 - self.ratio)))

    def no_weight_decay(self) -> set[str]:
        """Names the parameters that weight decay leaves alone, as timm asks for them."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"token"}

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Hides patches at random and predicts them.

        images: (B, C, h, w) as the encoder takes them. generator: draws the hidden patches; the
        global one if None.
        """
        target = self.patches(images)
        b, patches, _ = target.shape
        # The first patches of a random order stay visible, (B, V), in the order of the image.
        order = torch.rand(b, patches, generator=generator).argsort(dim=1).to(images.device)
        visible = order[:, : self.visible_patches(patches)].sort(dim=1).values
        hidden = torch.ones(b, patches, dtype=torch.bool, device=images.device)
        hidden.scatter_(1, visible, False)
        prediction = self.decode(self.encode(images, visible), visible, patches)
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        error = (prediction.float() - (target - mean) / (var + 1e-6).sqrt()).square().mean(dim=-1)
        return Reconstruction(error[hidden].mean(), prediction, hidden)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Encodes the visible patches and the prefix tokens (class token, registers).

        visible: (B, V) indices of patches. Returns (B, prefix + V, D) normed tokens.
        """
        encoder = self.encoder
        # Some timm models have no positions for prefix tokens, and one row a patch; the others have
        # the rows of the prefix first.
        prefix_rows = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
        x = encoder.patch_embed(images) + encoder.pos_embed[:, prefix_rows:]
        # (B, P, D) -> (B, V, D)
        x = x.gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        tokens = [encoder.cls_token]
        if encoder.reg_token is not None:
            tokens.append(encoder.reg_token)
        prefix = torch.cat(tokens, dim=1)
        if prefix_rows == encoder.num_prefix_tokens:
            prefix = prefix + encoder.pos_embed[:, :prefix_rows]
        x = encoder.norm_pre(torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1))
        return encoder.norm(encoder.blocks(x))

    def decode(self, tokens: Tensor, visible: Tensor, patches: int) -> Tensor:
        """Predicts the pixels of all patches, hidden or not.

        tokens: (B, prefix + V, D) of `encode`. visible: (B, V). patches: P. Returns (B, P, S*S*C).
        """
        prefix = self.encoder.num_prefix_tokens
        x = self.embed(tokens)
        # A mask token in each place, (B, P, decoder width), and the visible ones in theirs.
        full = self.token.to(x.dtype).expand(x.shape[0], patches, -1)
        full = full.scatter(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, prefix:])
        x = torch.cat([x[:, :prefix], full], dim=1) + self.positions.to(x.dtype)
        return self.predict(self.norm(self.blocks(x)))[:, prefix:]

    def patches(self, images: Tensor) -> Tensor:
        """Cuts images (B, C, h, w) into patches (B, P, S*S*C), row by row from the top left."""
        return nn.functional.unfold(images.float(), self.side, stride=self.side).transpose(1, 2)

    def picture(self, images: Tensor, out: Reconstruction) -> Tensor:
        """Replaces the hidden patches of images (B, C, h, w) by the predicted ones.

        A prediction is brought back to the scale of its patch in `images`.
        """
        target = self.patches(images)
        scale = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        predicted = out.prediction.float() * scale + target.mean(dim=-1, keepdim=True)
        patches = torch.where(out.hidden.unsqueeze(-1), predicted, target).transpose(1, 2)
        return nn.functional.fold(patches, images.shape[-2:], self.side, stride=self.side)
