"""Hidden neurons chosen while a model runs, by what the images at hand activate.

The score is that of ToaSt (2602.15720), as its public code has it: the absolute activation of the
class token, counted twice, and those of the patches, weighted by the attention that the class token
pays them. ToaSt looks at a random fiftieth of the patches; here all are looked at. Chosen from a
batch, the neurons depend on which images share it: in the order of classes on the label.

Axis letters: **B** images, **N** tokens of an image, **H** hidden width, **G** choices (B by image,
1 by batch), **S** neurons that stay.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..models.backbone import write_out_attention
from .assemble import narrow_mlp
from .correction import kept_weights
from .record import mlps_of

CLASS_WEIGHT = 2.0  # of the class token in the score, where all patches together weigh below 1


class ChannelMask(nn.Module):
    """Zeroes all hidden neurons of an MLP but the S with the highest scores of an image or a batch.

    It takes the place of the MLP's norm, between activation function and second map, and has no
    parameters: the model's state keeps its names. pool: "image" or "batch".
    """

    def __init__(self, hidden: int, active: float, pool: str):
        super().__init__()
        self.kept = max(1, round(active * hidden))  # S
        self.pool = pool
        self.attention: Tensor | None = None  # (B, N) of the class token, mean over heads
        self.chosen: Tensor | None = None  # (G, S) of the last images

    def watch(self, dropout: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Takes the attention map (B, heads, N, N) of the block on its way through its dropout."""
        self.attention = args[0][:, :, 0].mean(dim=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Masks (B, N, H) after the activation function."""
        scores = channel_scores(hidden, self.attention, self.pool)
        self.attention, self.chosen = None, scores.topk(self.kept, dim=1).indices
        mask = torch.zeros_like(scores).scatter(1, self.chosen, 1.0)
        return hidden * mask.unsqueeze(1).to(hidden.dtype)


def channel_scores(hidden: Tensor, attention: Tensor, pool: str) -> Tensor:
    """Scores hidden neurons: (G, H), of each image or of the batch.

    hidden: (B, N, H), class token first. attention: (B, N) of the class token; its own place is not
    used. For a batch the attention to a place is averaged over images first, as in ToaSt.
    """
    magnitudes, weights = hidden.float().abs(), attention.float().clone()
    weights[:, 0] = CLASS_WEIGHT
    if pool == "batch":
        magnitudes, weights = (part.mean(dim=0, keepdim=True) for part in (magnitudes, weights))
    # not a matrix product: autocast would round it, and close scores would become equal
    return (magnitudes * weights.unsqueeze(-1)).sum(dim=1)


def check_maskable(model: nn.Module) -> dict[str, Mlp]:
    """Returns {name: MLP} of the layers whose neurons can be chosen at run time.

    Raises ValueError as `mlps_of`, for anything but a ViT with a class token, and for MLPs that are
    not timm's plain `Mlp`.
    """
    if not isinstance(model, VisionTransformer) or not model.num_prefix_tokens:
        raise ValueError(
            f"channels are scored by the class token and by the attention that it pays: "
            f"{type(model).__name__} has none; take a timm VisionTransformer with a class token"
        )
    mlps = mlps_of(model)
    for name, mlp in mlps.items():
        if not isinstance(mlp, Mlp):
            raise ValueError(
                f"{name} is a {type(mlp).__name__}: channels are chosen in timm.layers.Mlp, in the "
                "place of its norm"
            )
    return mlps


def mask_channels(model: VisionTransformer, active: float, pool: str) -> dict[str, ChannelMask]:
    """Puts a mask into every MLP of a ViT, in place, and returns them by the MLP's name.

    Attention is written out, since a fused kernel never holds the map that the score needs.
    """
    masks = {}
    write_out_attention(model)
    for name, mlp in check_maskable(model).items():
        mlp.norm = masks[name] = ChannelMask(mlp.fc1.out_features, active, pool)
        block = model.get_submodule(name.rpartition(".")[0])
        block.attn.attn_drop.register_forward_pre_hook(masks[name].watch)
    return masks


@torch.no_grad()
def narrow_to_channels(model: VisionTransformer, active: float, images: Tensor) -> None:
    """Makes every MLP narrow, in place: the neurons that one batch of images chooses stay for all.

    images: (B, C, height, width). Nothing makes up for the neurons that go.
    """
    twin = copy.deepcopy(model).eval()  # masks and hooks go with it
    masks = mask_channels(twin, active, "batch")
    twin(images)
    for name, mask in masks.items():
        mlp, kept = model.get_submodule(name), mask.chosen[0].sort().values
        model.set_submodule(name, narrow_mlp(mlp, kept_weights(mlp, kept)))
