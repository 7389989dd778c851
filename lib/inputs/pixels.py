"""Decodes a picture to the pixels that a person sees: upright, in colour, never clipped, on white
where it is transparent.

Axis letters: **h**, **w** height and width.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Pillow's modes of 16 bits a pixel; a PNG of 16 bits was mode I in older versions
SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N"}
# Formats that are read, by Pillow's names: pictures alone. Others run programs (EPS) or read the
# formats of measuring instruments.
FORMATS = tuple("AVIF BMP DIB GIF JPEG JPEG2000 PNG PPM PSD QOI TGA TIFF WEBP ICO MPO".split())
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and one of its values
OF_NO_SCALE = {"I": "32-bit whole numbers", "F": "floating-point numbers"}


def opened(file: Path | BinaryIO) -> Image.Image:
    """Opens a picture of one of `FORMATS`, without decoding it; raises what Pillow raises."""
    Image.init()
    return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])


def rgb(file: Path | BinaryIO) -> Tensor:
    """Decodes an image file, whatever its name says, to (3, h, w) uint8.

    It is turned as its EXIF orientation says, and laid on white. 16 bits a pixel are scaled to 8;
    of a file with several frames the first is read. Raises ValueError for pixels whose scale the
    file does not say, and what Pillow raises for a file that does not decode.
    """
    with opened(file) as picture:
        tags = getattr(picture, "tag_v2", {})
        # Pillow turns greys of 8 bits round by itself, and none of 16
        is_negative = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
        pixels = _eight_bits(ImageOps.exif_transpose(picture), picture.format, is_negative)
    # (h, w, 3) in memory
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _eight_bits(picture: Image.Image, kind: str | None, is_negative: bool) -> np.ndarray:
    """Gives (h, w, 3) uint8. kind: the format of the file, as Pillow names it; is_negative: 0
    stands for white in a grey picture of 16 bits."""
    if picture.mode in SIXTEEN_BITS or (picture.mode == "I" and kind in ("PNG", "PPM")):
        # Pillow's own conversion cuts at 255 and turns most pictures white; 65535 = 255 * 257
        stored = np.asarray(picture).astype(np.int64)
        grey = (stored + 128) // 257
        if is_negative:
            grey = 255 - grey
        if "transparency" in picture.info:  # the one grey that is
            grey[stored == picture.info["transparency"]] = 255
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if what := OF_NO_SCALE.get(picture.mode):
        raise ValueError(
            f"its pixels are {what}, and nothing says which value is white: save it with 8 or 16 "
            "bits a colour"
        )
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        if coloured.getchannel("A").getextrema()[0] < 255:
            white = Image.new("RGBA", coloured.size, "white")
            return np.array(Image.alpha_composite(white, coloured).convert("RGB"))
    return np.array(picture.convert("RGB"))
