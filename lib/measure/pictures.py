"""Pictures of what a model does with single images: reconstructions, expert maps, GradCAM.

Axis letters: **P** pictured images, **C** channels, **S** side of an image in pixels, **N** tokens
of an image, **M** MoE layers from the shallowest to the deepest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..inputs.splits import Split, scale_of
from ..models.moe import RoutingTape
from ..routers.base import Routing
from ..routers.manual import labelled
from ..spec import RunSpec
from ..training.evaluate import whole_type
from ..training.losses import autocast
from .routing import BOARD_CELLS


@torch.inference_mode()
def reconstructions(
    model: nn.Module, split: Split, spec: RunSpec, index: Tensor
) -> dict[str, np.ndarray]:
    """Lets a masked autoencoder fill in the hidden patches of the P images `index`.

    Returns "picture" (P, C, S, S) uint8 and "hidden" (P, patches) bool.
    """
    model.eval()
    images = split.batch(index, spec).to(spec.device)
    with autocast(spec):
        out = model(images, torch.Generator().manual_seed(0))
    mean, std = scale_of(images.shape[1], spec.backbone)
    pixels = model.picture(images, out).float().cpu() * std + mean
    return {
        "picture": (255 * pixels.clamp(0, 1)).round().to(torch.uint8).numpy(),
        "hidden": out.hidden.cpu().numpy(),
    }


@torch.inference_mode()
def token_maps(model: nn.Module, split: Split, spec: RunSpec, index: Tensor) -> Tensor:
    """Returns the (M, P, N) first-choice expert of each token of the P images `index`.

    Of an ensemble the first member's. Layers of fewer tokens are filled up with -1.
    """
    model.eval()
    with (
        RoutingTape(model) as tape,
        autocast(spec),
        labelled(model, split.labels[index].to(spec.device)),
    ):
        model(split.batch(index, spec).to(spec.device))
    return first_choices(tape.routings(), len(index))


def first_choices(routings: Sequence[Routing], images: int) -> Tensor:
    """Returns the (M, images, N) first choice of each token of the first `images`, before dropping.

    The type is the smallest that holds the experts. -1 fills up layers with fewer tokens (Swin,
    ConvNeXt).
    """
    dtype = whole_type(max(routing.experts for routing in routings))
    maps = [r.token_choice()[:images, :, 0].to("cpu", dtype) for r in routings]
    most = max(layer.shape[1] for layer in maps)
    return torch.stack([F.pad(layer, (0, most - layer.shape[1]), value=-1) for layer in maps])


def gradcam(
    model: nn.Module, split: Split, spec: RunSpec, index: Tensor, block: int = -1
) -> np.ndarray:
    """Computes (P, S, S) float16 GradCAM (1610.02391) of the predicted classes of the P images
    `index`, each scaled to 0..1, in float32.

    block: where it is taken, namely where the attention of that block reads; in the last block this
    is the last place at which patches still lead to the class token. Raises ValueError if the model
    is no timm ViT.
    """
    from pytorch_grad_cam import GradCAM

    if not isinstance(model, VisionTransformer):
        raise ValueError(
            "cam_probe=True needs the patch grid of a timm VisionTransformer, got "
            f"{type(model).__name__}: set it to False, or take one"
        )
    rows, columns = model.patch_embed.grid_size

    def as_grid(tokens: Tensor) -> Tensor:
        patches = tokens[:, model.num_prefix_tokens :]  # (P, rows * columns, width)
        return patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)

    model.eval()
    images = split.batch(index, spec).to(spec.device)
    labels = split.labels[index].to(spec.device)
    # The library takes gradients of activations, so something below them must want one, whatever a
    # stage froze.
    with (
        labelled(model, labels),
        GradCAM(model, [model.blocks[block].norm1], reshape_transform=as_grid) as cam,
    ):
        return cam(images.requires_grad_(True), targets=None).astype(np.float16)


@torch.inference_mode()
def checkerboard(model: nn.Module, spec: RunSpec, channels: int) -> Tensor:
    """Returns the (M, N) first-choice expert of each token of a checkerboard of BOARD_CELLS x
    BOARD_CELLS squares in two colours.

    An image without objects: what still differs between its tokens is colour and place. Under
    manual routing it is of class 0.
    """
    side = spec.data.image_size
    cell = torch.arange(side) * BOARD_CELLS // side
    second_colour = (cell[:, None] + cell[None, :]) % 2 == 1  # (S, S)
    colours = torch.tensor([[0.1], [0.9]])  # (2, C)
    if channels == 3:
        colours = torch.tensor([[0.85, 0.25, 0.15], [0.15, 0.35, 0.85]])
    pixels = torch.where(second_colour, colours[1].view(-1, 1, 1), colours[0].view(-1, 1, 1))
    mean, std = scale_of(channels, spec.backbone)
    model.eval()
    tape = RoutingTape(model)
    label = torch.zeros(1, dtype=torch.long, device=spec.device)
    with tape, autocast(spec), labelled(model, label):
        model(((pixels.unsqueeze(0) - mean) / std).to(spec.device))
    return first_choices(tape.routings(), 1)[:, 0]
