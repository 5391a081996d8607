"""Read an image file of any kind as RGB, 8 bits a channel, upright."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from ..errors import UserError, cut, one_line, reason_of
from .files import open_file

_WHITE_OF_FLOATS = (1.0, 255.0, 65535.0)
_WHITE_OF_INTEGERS = 65535.0
_SAMPLE = 32  # images of a data set that tell its intensities


class IntensityRange:
    """Which intensity is white in the images of a data set that have more than 8 bits: one for all of them.

    Integers are white at 65535. Floats are at 1, 255 or 65535: the first that no image exceeds of `_SAMPLE` images,
    spread evenly over the data set. They are read when the first image of floats is met.

    Args:
        folder: of the images.
        files: their names in it.
        white: the intensity; 0: as above.
    """

    def __init__(self, folder: Path, files: Sequence[str], white: float = 0.0) -> None:
        self.folder = folder
        self.files = files
        self.white = white
        self.of_floats = 0.0

    def __call__(self, values: np.ndarray) -> float:
        """The intensity of white in an image of these values."""
        if self.white or values.dtype.kind != "f":
            return self.white or _WHITE_OF_INTEGERS
        if not self.of_floats:
            chosen = np.unique(np.linspace(0, len(self.files) - 1, min(_SAMPLE, len(self.files))).astype(int)).tolist()
            brightest = [_brightest(self.folder / self.files[i]) for i in chosen]
            self.of_floats = white_of_floats(max(brightest, default=0.0))
        return self.of_floats


def white_of_floats(brightest: float) -> float:
    """The smallest usual intensity of white that is not exceeded; the largest if all are."""
    return next((white for white in _WHITE_OF_FLOATS if brightest <= white), _WHITE_OF_FLOATS[-1])


def of_this_image(values: np.ndarray) -> float:
    """As `IntensityRange`, of a data set of one image."""
    return white_of_floats(values.max()) if values.dtype.kind == "f" else _WHITE_OF_INTEGERS


def read_image(
    path: str | Path,
    expected_size: tuple[int, int] | None = None,
    white: Callable[[np.ndarray], float] = of_this_image,
) -> torch.Tensor:
    """The pixels of `path`: uint8, (3, H, W), RGB, turned upright as its EXIF orientation says.

    Transparency is dropped (the colours beneath it are kept, as detectron2 does). Deeper greyscale is scaled, not
    clipped: 0…65535 becomes 0…255, and so does, in an image of floats, 0…1, 0…255 or 0…65535.

    Args:
        path: any file that PIL opens; of several frames the first is taken.
        expected_size: (height, width) that the upright image must have, or None.
        white: from deeper values to the intensity that becomes 255, an `IntensityRange` for the images of a data set.

    Raises:
        UserError: missing, no regular file, truncated or not an image; without pixels; values without a known range;
            another size than expected.
    """
    name = f"image {path}"
    try:
        image, stored = _open(path)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; check the image folder and the annotations' file_name") from None
    except Exception as error:  # decoders raise anything when a file is not, or not wholly, an image
        raise UserError(
            f"{name}: cannot be read ({_reason(error)}); replace the file or remove it from the data set"
        ) from error

    size = (image.height, image.width)
    if expected_size is not None and size != tuple(expected_size):
        message = (
            f"{name}: is {size[1]} x {size[0]} pixels (width x height), "
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
    if 0 in size:
        raise UserError(f"{name}: is {size[1]} x {size[0]} pixels; remove it from the data set")
    return to_rgb(image, name, white)


def to_rgb(image: Image.Image, name: str, white: Callable[[np.ndarray], float] = of_this_image) -> torch.Tensor:
    """The pixels of an image as it lies: uint8, (3, H, W), RGB; see `read_image`.

    Args:
        name: for the message.

    Raises:
        UserError: values without a known range, or a mode without a way to RGB.
    """
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image, name, white)
    try:
        if "transparency" in image.info:  # PIL warns when a palette loses it on the direct way
            image = image.convert("RGBA")
        return F.pil_to_tensor(image.convert("RGB"))
    except Exception as error:
        raise UserError(
            f"{name}: its mode {image.mode} has no way to RGB ({_reason(error)}); convert the file"
        ) from error


def _open(path: str | Path) -> tuple[Image.Image, tuple[int, int]]:
    """The upright image, and its (height, width) before."""
    with open_file(path) as stream, Image.open(stream) as file:
        file.load()
        return ImageOps.exif_transpose(file), (file.height, file.width)


def _to_eight_bits(image: Image.Image, name: str, white: Callable[[np.ndarray], float]) -> Image.Image:
    """`convert("L")` would clip all above 255 to white; scale the range of the data set instead."""
    values = np.asarray(image).astype(np.float64 if image.mode == "F" else np.int64)
    top = white(values)
    if not (values.min() >= 0 and values.max() <= top):  # also when there is a NaN
        raise UserError(
            f"{name}: mode {image.mode} with values {values.min():g} to {values.max():g}, of which {top:g} is white; "
            "expected 0 to 65535, or of floats 0 to 1, 255 or 65535, whatever holds a sample of the data set: set "
            "INPUT.MAX_INTENSITY to the intensity of white, or convert the images to 8 bits"
        )
    return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))


def _brightest(path: Path) -> float:
    """The largest value of an image of floats; 0 of others, also of broken ones, which are told of when they come."""
    try:
        with open_file(path) as stream, Image.open(stream) as file:
            return float(np.nanmax(np.asarray(file), initial=0)) if file.mode == "F" else 0.0
    except Exception:
        return 0.0


def _reason(error: BaseException) -> str:
    return cut(one_line(reason_of(error)), 200) or type(error).__name__
