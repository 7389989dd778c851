"""One pass over a split: accuracy, loss, predictions, and the routings on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..inputs.splits import Split, scale_of
from ..models.moe import RoutingTape
from ..routers.manual import labelled
from ..spec import RunSpec
from ..training.losses import autocast

if TYPE_CHECKING:  # a probe is handed in; evaluation knows no measure
    pass


@torch.inference_mode()
def reconstructions(
    model: nn.Module, split: Split, spec: RunSpec, index: Tensor
) -> dict[str, np.ndarray]:
    """ "picture" (P, C, S, S) uint8 with the hidden patches filled in, and "hidden" (P, patches)
    bool, of the P images `index`."""
    model.eval()
    images = split.batch(index, spec.data).to(spec.device)
    with autocast(spec):
        out = model(images, torch.Generator().manual_seed(0))
    pixels = (
        model.picture(images, out).float().cpu() * scale_of(images.shape[1])[1]
        + scale_of(images.shape[1])[0]
    )
    return {
        "picture": (255 * pixels.clamp(0, 1)).round().to(torch.uint8).numpy(),
        "hidden": out.hidden.cpu().numpy(),
    }


@torch.inference_mode()
def token_maps(model: nn.Module, split: Split, spec: RunSpec, index: Tensor) -> Tensor | None:
    """(M, P, N) int8 first-choice expert of each token of the P images `index`, for M MoE layers;
    None without any.

    Of an ensemble the first member's. Layers of fewer tokens (Swin, ConvNeXt) are filled up with
    -1.
    """
    model.eval()
    with (
        RoutingTape(model) as tape,
        autocast(spec),
        labelled(model, split.labels[index].to(spec.device)),
    ):
        model(split.batch(index, spec.data).to(spec.device))
    maps = [
        routing.token_choice()[: len(index), :, 0].to("cpu", torch.int8)
        for routing in tape.routings()
    ]
    most = max((each.shape[1] for each in maps), default=0)
    return (
        torch.stack([F.pad(each, (0, most - each.shape[1]), value=-1) for each in maps])
        if maps
        else None
    )


def gradcam(model: nn.Module, split: Split, spec: RunSpec, index: Tensor) -> np.ndarray:
    """(P, S, S) float16 GradCAM (1610.02391) of the predicted classes of the P images `index`, each
    scaled to 0..1, in float32.

    Taken where the last block's attention reads, the last place at which patches still lead to the
    class token. ValueError if the model is no timm ViT.
    """
    from pytorch_grad_cam import GradCAM

    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"cam_probe=True needs the patch grid of a timm VisionTransformer, got {type(model).__name__}"
        )
    rows, columns = model.patch_embed.grid_size

    def grid(tokens: Tensor) -> Tensor:
        return (
            tokens[:, model.num_prefix_tokens :].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        )

    model.eval()
    images, labels = (
        split.batch(index, spec.data).to(spec.device),
        split.labels[index].to(spec.device),
    )
    # The library takes gradients of activations, so something below them must want one, whatever a
    # stage froze.
    with (
        labelled(model, labels),
        GradCAM(model, [model.blocks[-1].norm1], reshape_transform=grid) as cam,
    ):
        return cam(images.requires_grad_(True), targets=None).astype(np.float16)


@torch.inference_mode()
def checkerboard(model: nn.Module, spec: RunSpec, channels: int, cells: int = 4) -> Tensor:
    """(M, N) int8 first-choice expert of each token of a checkerboard of `cells` x `cells` squares
    in two colours.

    An image without objects: what still differs between its tokens is colour and place. Under
    manual routing it is of class 0.
    """
    side = spec.data.image_size
    where = torch.arange(side) * cells // side
    second = (where[:, None] + where[None, :]) % 2 == 1
    colours = (
        torch.tensor([[0.85, 0.25, 0.15], [0.15, 0.35, 0.85]])
        if channels == 3
        else torch.tensor([[0.1], [0.9]])
    )
    pixels = torch.where(second, colours[1].view(-1, 1, 1), colours[0].view(-1, 1, 1)).unsqueeze(0)
    mean, std = scale_of(channels)
    model.eval()
    tape = RoutingTape(model)
    with (
        tape,
        autocast(spec),
        labelled(model, torch.zeros(1, dtype=torch.long, device=spec.device)),
    ):
        model(((pixels - mean) / std).to(spec.device))
    return torch.stack(
        [routing.token_choice()[0, :, 0].to("cpu", torch.int8) for routing in tape.routings()]
    )
