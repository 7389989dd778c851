"""Pixels as a person sees them: upright, scaled or refused, never clipped."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lib.inputs.pixels import rgb


def saved(picture: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    out.seek(0)
    return out


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    grey = np.array([[0, 128, 129, 257], [20_000, 32_768, 65_406, 65_535]], dtype=np.uint16)
    pixels = rgb(saved(Image.fromarray(grey), kind))
    # 65535 / 255 = 257, rounded to the nearest
    assert pixels.tolist() == [[[0, 0, 1, 1], [78, 128, 254, 255]]] * 3
    assert pixels.dtype == torch.uint8


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_the_orientation_that_a_phone_writes(orientation, upright, mode):
    stored = np.array([[1, 2, 3], [4, 5, 6]])
    if mode == "RGB":
        picture = Image.fromarray(np.repeat(stored[:, :, None], 3, axis=2).astype(np.uint8))
    else:
        picture = Image.fromarray((stored * 257).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = rgb(saved(picture, exif=exif))
    assert pixels.tolist() == [upright] * 3 and pixels.is_contiguous()


@pytest.mark.parametrize("mode, what", [("F", "floating-point"), ("I", "32-bit whole")])
def test_pixels_without_a_scale_are_refused(mode, what):
    picture = Image.fromarray(np.array([[0, 300], [5, 70_000]], np.int32)).convert(mode)
    with pytest.raises(ValueError, match=f"pixels are {what}.*which value is white"):
        rgb(saved(picture, "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_common_modes_keep_their_greys(mode):
    picture = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert(mode)
    assert rgb(saved(picture)).tolist() == [[[0, 255], [255, 0]]] * 3


def test_cmyk_and_the_first_of_several_frames():
    assert rgb(saved(Image.new("CMYK", (2, 2)), "JPEG")).min() > 250  # no ink
    frames = [Image.new("RGB", (2, 2), (value,) * 3) for value in (9, 200)]
    stack = saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert rgb(stack).unique().tolist() == [9]
