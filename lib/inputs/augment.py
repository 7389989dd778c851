"""Resizes and augments images; every random draw comes from a generator that is handed over.

A single image is (C, h, w) uint8, a batch is (B, C, h, w) floats in 0..1. Axis letters: **B**
images, **C** channels, **S** side in pixels that the model sees, **h**, **w** height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# longer sides of an image, in shorter ones, of which the middle is taken before it is resized
LONGEST = 16


def augmented(
    images: list[Tensor], kind: str, side: int, generator: torch.Generator | None
) -> Tensor:
    """Makes one (B, C, S, S) batch of images and augments it by a word of `DataSpec.augment`.

    generator: draws from it what `kind` leaves to chance, in one order; "none" needs none.
    """
    if kind == "resized_crop":
        crops = [random_resized_crop(image, side, generator) for image in images]
        return random_flip(torch.stack(crops), generator)
    if kind == "auto":
        images = auto_augment(images, generator)
    pixels = _one_batch(images, side)
    if kind in ("shift", "flip_crop", "auto"):
        # an eighth of the side: the usual 4 pixels of CIFAR's 32
        reach = 1 if kind == "shift" else max(1, pixels.shape[-1] // 8)
        pixels = random_shift(pixels, reach, generator)
    if kind in ("flip", "flip_crop", "auto"):
        pixels = random_flip(pixels, generator)
    return resize(pixels, side)


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalises a batch in its own memory. mean, std: (1, C, 1, 1) of pixels in 0..1."""
    return pixels.sub_(mean).div_(std)


def pass_over(kind: str, count: int, generator: torch.Generator) -> None:
    """Draws what `augmented` draws for `count` images, and does nothing with it."""
    if kind == "resized_crop":
        torch.rand(count, 4, generator=generator)
    if kind == "auto":
        torch.randint(2**62, (1,), generator=generator)
    if kind in ("shift", "flip_crop", "auto"):
        torch.randint(0, 3, (2, count), generator=generator)
    if kind in ("flip", "flip_crop", "auto", "resized_crop"):
        torch.rand(count, generator=generator)


def places_read(kind: str, count: int, share: slice) -> range:
    """Lists which of `count` images must be read for a share of their batch; the others may be
    blank.

    Crops of a random size are made of each image by itself. Else all images are looked at: whether
    a batch is resized as one depends on all their shapes.
    """
    return range(count)[share] if kind == "resized_crop" else range(count)


def _one_batch(images: list[Tensor], side: int) -> Tensor:
    """Stacks images of one square shape as they are; others are resized and cropped to S.

    Shifts come after it. So they are counted in pixels of the images where all have one square
    shape, and in pixels of S where not: what "shift" makes of an image depends on that, and the
    step in which "flip_crop" and "auto" move one.
    """
    shapes = {image.shape for image in images}
    _, height, width = images[0].shape
    if len(shapes) > 1 or height != width:
        # One by one: resizing an image does not depend on its neighbours in the batch.
        return torch.stack([resize_and_crop_centre(image, side) for image in images])
    return torch.stack(images).float().div_(255)


def resize(pixels: Tensor, side: int) -> Tensor:
    """Resizes a batch to (B, C, S, S); one of that side is returned as it is."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    return _bicubic(pixels, (side, side))


def _bicubic(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 1)  # bicubic overshoots beside edges


def resize_and_crop_centre(image: Tensor, side: int) -> Tensor:
    """Resizes a square image whole to (C, S, S), and takes the centre of any other.

    The shorter side of an oblong image is first made S * 8/7: the rule of 256 -> 224. Of one that
    is longer than LONGEST times its shorter side the middle of that length is taken before, since
    nearly all of what would be resized is cut off.
    """
    most = LONGEST * min(image.shape[-2:])
    image = _middle(_middle(image, -2, most), -1, most)
    height, width = image.shape[-2:]
    batch_of_one = image[None].float().div_(255)
    if height == width:
        return resize(batch_of_one, side)[0]
    scale = side * 8 / 7 / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    resized = _bicubic(batch_of_one, size)[0]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return resized[:, top : top + side, left : left + side]


def _middle(image: Tensor, axis: int, most: int) -> Tensor:
    """Takes the middle of an axis that is longer than `most`, and all of any other."""
    length = image.shape[axis]
    return image if length <= most else image.narrow(axis, (length - most) // 2, most)


def random_resized_crop(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Resizes a random box of an image, of 20-100% of its area and aspect 3/4-4/3, to (C, S, S).

    What reaches beyond the image is cut off, so boxes of oblong images are smaller and narrower.
    """
    height, width = image.shape[-2:]
    draw = torch.rand(4, generator=generator).tolist()
    area = height * width * (0.2 + 0.8 * draw[0])
    aspect = (3 / 4) * (16 / 9) ** draw[1]  # from 3/4 to 4/3, even in its logarithm
    box_height = min(height, max(1, round((area / aspect) ** 0.5)))
    box_width = min(width, max(1, round((area * aspect) ** 0.5)))
    top = int(draw[2] * (height - box_height + 1))
    left = int(draw[3] * (width - box_width + 1))
    box = image[:, top : top + box_height, left : left + box_width].float().div(255)
    return resize(box[None], side)[0]


def random_shift(pixels: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Moves each image of a batch by up to `reach` pixels each way; the border becomes black."""
    b, _, height, width = pixels.shape
    padded = F.pad(pixels, (reach,) * 4)
    offset = torch.randint(0, 2 * reach + 1, (2, b), generator=generator)
    rows = offset[0][:, None] + torch.arange(height)  # (B, h)
    columns = offset[1][:, None] + torch.arange(width)  # (B, w)
    # Index tensors around a slice put the sliced axis last: (B, h, w, C)
    moved = padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def random_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images of a batch, chosen at random, left to right."""
    is_mirrored = torch.rand(pixels.shape[0], generator=generator) < 0.5
    return torch.where(is_mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


def auto_augment(images: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Applies AutoAugment's CIFAR-10 policy (1805.09501) to single uint8 images."""
    from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    # torchvision draws from the global generator: it is borrowed, seeded by ours, and given back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        return [policy(image) for image in images]
