"""Images of any kind, found and read one by one: files, folders, patterns, PIL images, arrays and tensors."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..data.image import read_image, to_rgb
from ..errors import UserError, quote
from ..paths import user_path

White = Callable[[np.ndarray], float]  # see `data.image.read_image`


class Source(NamedTuple):
    """An image that is yet to be read, and what it is called: its path, or its number among the inputs."""

    name: str
    content: Any

    def read(self, white: White) -> Tensor:
        """RGB (3, H, W), upright: uint8, or what a tensor of floats holds.

        Args:
            white: the intensity of white in an image file of more than 8 bits.

        Raises:
            UserError: it cannot be read, or is no image.
        """
        if isinstance(self.content, Path):
            return read_image(self.content, white=white)
        if isinstance(self.content, Image.Image):
            image = to_rgb(ImageOps.exif_transpose(self.content), self.name, white)
        elif isinstance(self.content, np.ndarray):
            image = self._of_array(self.content)
        else:
            image = self._of_tensor(self.content)
        if 0 in image.shape:
            raise UserError(f"{self.name}: has no pixels, its shape is {tuple(image.shape)}")
        return image

    def _of_array(self, array: np.ndarray) -> Tensor:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise UserError(
                f"{self.name}: expected an array of RGB as uint8 (H, W, 3), got {array.dtype} {array.shape}"
            )
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    def _of_tensor(self, tensor: Tensor) -> Tensor:
        fits = tensor.ndim == 3 and tensor.shape[0] == 3
        if fits and tensor.is_floating_point():
            fits = bool(((tensor >= 0) & (tensor <= 1)).all())
        elif tensor.dtype != torch.uint8:
            fits = False
        if not fits:
            raise UserError(
                f"{self.name}: expected a tensor (3, H, W) of RGB, as uint8 or as floats from 0 to 1, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        return tensor.detach().cpu().as_subclass(Tensor)


def is_one(inputs: Any) -> bool:
    """Whether it is an image, or the path of one, and not what may hold several."""
    if isinstance(inputs, (str, os.PathLike)):
        path = user_path(inputs)
        return not path.is_dir() and (path.exists() or not glob.has_magic(str(path)))
    return not isinstance(inputs, (list, tuple))


def find_images(inputs: Any) -> Iterator[Source | UserError]:
    """The images of an input, or of a list of inputs, in order; in the place of an unknown one what is wrong with it.

    A folder stands for the image files that lie in it, as they would be counted: `2.jpg`, then `10.jpg`. So does a
    pattern of `glob` for those that match it; `**` is folders at any depth.
    """
    for number, one in enumerate(inputs if isinstance(inputs, (list, tuple)) else [inputs], start=1):
        if isinstance(one, (str, os.PathLike)):
            try:
                yield from (Source(str(path), path) for path in _files(one))
            except UserError as error:
                yield error
        elif isinstance(one, (Image.Image, np.ndarray, Tensor)):
            yield Source(f"image {number}", one)
        else:
            yield UserError(
                f"image {number}: expected a path, a folder, a pattern, a PIL image, an array or a tensor, "
                f"got {quote(one)}"
            )


def _files(given: str | os.PathLike[str]) -> list[Path]:
    path = user_path(given)
    if path.is_dir():
        try:
            names = [name for name in os.listdir(path) if not name.startswith(".")]
        except OSError as error:
            raise UserError(f"folder {given}: cannot be read ({error.strerror})") from error
        found = [path / name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        if not found:
            raise UserError(f"folder {given}: no images in it; expected files that end in {', '.join(IMG_EXTENSIONS)}")
    elif path.exists() or not glob.has_magic(str(path)):
        if not path.exists():
            raise UserError(f"image {given}: no such file or folder")
        return [path]
    else:
        matches = map(Path, glob.glob(str(path), recursive=True))
        found = [match for match in matches if match.name.lower().endswith(IMG_EXTENSIONS) and match.is_file()]
        if not found:
            raise UserError(f"pattern {given}: matches no image")
    return sorted(found, key=_counted)


def _counted(path: Path) -> list[Any]:
    """Texts and numbers in turn: numbers in names are compared as such."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", str(path)))]
