"""Pixels as a person sees them: upright, scaled or refused, never clipped."""

from __future__ import annotations

import io
import struct

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


# ---- what is not there is white


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode):
    # black, half black, and a hidden black; an opaque grey
    grey = np.array([[0, 0, 0, 90]], np.uint8)
    alpha = np.array([[255, 128, 0, 255]], np.uint8)
    picture = Image.fromarray(grey).convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    assert rgb(saved(picture)).tolist() == [[[0, 127, 255, 90]]] * 3


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_entry_of_a_palette_is_white(kind):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putpixel((1, 0), 1)
    pixels = rgb(saved(picture, kind, transparency=1))
    assert pixels[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize(
    "mode, hidden", [("L", 90), ("1", 255), ("RGB", (90, 90, 90)), ("I;16", 90 * 257)]
)
def test_a_transparent_colour_is_white(mode, hidden):
    values = np.array([[0, 255 if mode == "1" else 90]], np.uint8)
    picture = Image.fromarray(values).convert(mode)
    if mode == "I;16":
        picture = Image.fromarray(values.astype(np.uint16) * 257)
    assert rgb(saved(picture, transparency=hidden)).tolist() == [[[0, 255]]] * 3


@pytest.mark.parametrize("mode", ["RGBA", "RGB"])
def test_opaque_colours_stay_to_the_bit(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    picture = Image.fromarray(pixels, "RGBA").convert(mode)
    assert np.array_equal(rgb(saved(picture)).permute(1, 2, 0).numpy(), pixels[..., :3])


# ---- greys of 16 bits


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_a_negative_is_turned_round(bits, white_is_zero):
    stored = np.array([[0, 51, 255]], np.uint8) if bits == 8 else np.array([[0, 13107, 65535]])
    content = stored.astype(f"<u{bits // 8}").tobytes()
    tags = [(256, 3), (257, 1), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 8)]
    tags += [(277, 1), (278, 1), (279, len(content))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content += b"\0" * (len(content) % 2)
    head = b"II*\0" + struct.pack("<I", 8 + len(content)) + content
    file = io.BytesIO(head + struct.pack("<H", len(tags)) + entries + bytes(4))
    expected = [255, 204, 0] if white_is_zero else [0, 51, 255]
    assert rgb(file).tolist() == [[expected]] * 3


@pytest.mark.parametrize("most", [65535, 4095])
def test_a_grey_map_of_16_bits(most):
    values = np.array([0, round(most / 5), most]).astype(">u2").tobytes()
    file = io.BytesIO(f"P5\n3 1\n{most}\n".encode() + values)
    assert rgb(file).tolist() == [[[0, 51, 255]]] * 3
