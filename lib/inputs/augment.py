"""Resizes and augments images; every random draw comes from a generator that is handed over.

Axis letters: **B** images, **C** channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-2:] == (side, side):
        return pixels
    return F.interpolate(
        pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False
    ).clamp_(0, 1)


def fitted(image: Tensor, side: int) -> Tensor:
    """A square image whole; of another the centre, its shorter side first made side * 8/7: the rule
    of 256 -> 224."""
    h, w = image.shape[-2:]
    if h == w:
        return resize(image[None].float().div_(255), side)[0]
    scale = side * 8 / 7 / min(h, w)
    size = (max(side, round(h * scale)), max(side, round(w * scale)))
    big = F.interpolate(
        image[None].float().div_(255),
        size=size,
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )[0]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return big[:, top : top + side, left : left + side].clamp_(0, 1)


def resized_crop(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A random box of 20-100% of the area and aspect 3/4-4/3, resized to the model's side."""
    h, w = image.shape[-2:]
    draw = torch.rand(4, generator=generator).tolist()
    area, aspect = h * w * (0.2 + 0.8 * draw[0]), (3 / 4) * (16 / 9) ** draw[1]
    box_h, box_w = (
        min(h, max(1, round((area / aspect) ** 0.5))),
        min(w, max(1, round((area * aspect) ** 0.5))),
    )
    top, left = int(draw[2] * (h - box_h + 1)), int(draw[3] * (w - box_w + 1))
    box = image[:, top : top + box_h, left : left + box_w].float().div(255)
    return resize(box[None], side)[0]


def shift(pixels: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to `by` pixels each way; the border is filled with black."""
    b, _, h, w = pixels.shape
    padded = F.pad(pixels, (by,) * 4)
    offset = torch.randint(0, 2 * by + 1, (2, b), generator=generator)
    y, x = offset[0][:, None] + torch.arange(h), offset[1][:, None] + torch.arange(w)
    return (
        padded[torch.arange(b)[:, None, None], :, y[:, :, None], x[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def policy(images: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """AutoAugment's CIFAR-10 policy on uint8 images. torchvision draws from the global generator,
    so that one is borrowed."""
    from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        return [policy(image) for image in images]


def flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, chosen at random."""
    mirror = torch.rand(pixels.shape[0], generator=generator) < 0.5
    return torch.where(mirror.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
