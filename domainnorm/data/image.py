"""Read an image file of any kind as RGB, 8 bits a channel, upright."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from ..errors import UserError

# What PIL raises on a file that is not, or not wholly, an image; OSError includes "no such file" and "truncated".
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: str | Path, expected_size: tuple[int, int] | None = None) -> torch.Tensor:
    """The pixels of `path`: uint8, (3, H, W), RGB, turned upright as its EXIF orientation says.

    Transparency is dropped (the colours beneath it are kept, as detectron2 does). Deeper greyscale is scaled, not
    clipped: 0…65535 becomes 0…255, and so does 0…1 in an image of floats.

    Args:
        path: any file that PIL opens; of several frames the first is taken.
        expected_size: (height, width) that the upright image must have, or None.

    Raises:
        UserError: missing, truncated or not an image; values without a known range; another size than expected.
    """
    try:
        with Image.open(path) as file:
            file.load()
            stored = (file.height, file.width)
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise UserError(f"image {path}: no such file; check the image folder and the annotations' file_name") from None
    except _BROKEN as error:
        raise UserError(
            f"image {path}: cannot be read ({_one_line(error)}); replace the file or remove it from the data set"
        ) from error

    size = (image.height, image.width)
    if expected_size is not None and size != tuple(expected_size):
        message = (
            f"image {path}: is {size[1]} x {size[0]} pixels (width x height), "
            f"its annotations say {expected_size[1]} x {expected_size[0]}"
        )
        if stored == tuple(expected_size):
            message += (
                ", which are the pixels before the EXIF orientation is applied; "
                "remove the orientation tag or annotate the upright image"
            )
        else:
            message += "; correct width and height in the annotations or replace the image"
        raise UserError(message)
    return F.pil_to_tensor(_to_rgb(image, path))


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image, path)
    if "transparency" in image.info:  # PIL warns when a palette loses it on the direct way
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(f"image {path}: its mode {image.mode} has no way to RGB; convert the file") from error


def _to_eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """`convert("L")` would clip all above 255 to white; scale the 16-bit range instead."""
    values = np.asarray(image).astype(np.float64)
    # An image of floats up to 1 would be all black on the 16-bit scale: its scale is 0…1.
    top = 1.0 if image.mode == "F" and values.max() <= 1 else 65535.0
    if not (values.min() >= 0 and values.max() <= top):  # also when there is a NaN
        raise UserError(
            f"image {path}: mode {image.mode} with values {values.min():g} to {values.max():g}, "
            "expected 0 to 65535 (or 0 to 1 in floats); convert the file to 8 or 16 bits"
        )
    return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
