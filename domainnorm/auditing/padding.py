"""Where the images of a batch end, and what lies beyond is padding."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.moments import Moments


class Padding:
    """Images in the upper left corner of a larger batch.

    Args:
        sizes: `(height, width)` of each image.
        size: of the batch.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> None:
        self.sizes = list(sizes)
        self.size = size

    @staticmethod
    def of(images: Tensor) -> Padding | None:
        """The padding of a batch `(N, C, H, W)` with zeros to the right of images or below; None: there are none.

        An image that is black on the left and above, too, is taken as it is.
        """
        if images.ndim != 4 or not images.is_floating_point() or not images.numel():
            return None
        there = (images != 0).any(1)  # (N, H, W)
        sizes = []
        for rows, columns in zip(there.any(2).tolist(), there.any(1).tolist(), strict=True):
            ends = [max((k + 1 for k, has in enumerate(line) if has), default=0) for line in (rows, columns)]
            if not (rows[0] and columns[0]):
                ends = [len(rows), len(columns)]
            sizes.append((ends[0], ends[1]))
        found = Padding(sizes, (images.shape[2], images.shape[3]))
        return found if found.share > 0 else None

    @property
    def share(self) -> float:
        """The share of padding in the batch."""
        used = sum(h * w for h, w in self.sizes)
        return 1 - used / max(1, len(self.sizes) * self.size[0] * self.size[1])

    def moments(self, x: Tensor) -> tuple[Moments | None, float]:
        """The moments `(N, C)` of features `(N, C, h, w)` within the images, and the share of those beyond.

        None for features that are not of these images, or too small to have an outside.
        """
        if x.ndim != 4 or x.shape[0] != len(self.sizes) or min(x.shape[2:]) < 2:
            return None, 0.0
        height, width = x.shape[2:]
        inner = [
            (min(height, math.ceil(h * height / self.size[0])), min(width, math.ceil(w * width / self.size[1])))
            for h, w in self.sizes
        ]
        rows = [Moments.rows(x[k : k + 1, :, :h, :w]).double() for k, (h, w) in enumerate(inner)]
        return Moments.cat(rows), 1 - sum(h * w for h, w in inner) / (len(inner) * height * width)


@contextmanager
def padded_images(model: nn.Module, told: Callable[[Padding], None]) -> Iterator[None]:
    """In this block `told` is called with the padding of each batch that a detector of torchvision makes of images."""
    transform = sys.modules.get("torchvision.models.detection.transform")
    handles = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        images = output[0]
        padding = Padding(images.image_sizes, tuple(images.tensors.shape[-2:]))
        if padding.share > 0:
            told(padding)

    if transform is not None:
        for module in model.modules():
            if isinstance(module, transform.GeneralizedRCNNTransform):
                handles.append(module.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def images_in(batch: Any) -> Tensor | None:
    """The first tensor `(N, C, H, W)` of a batch."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim == 4 else None
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for value in values if (found := images_in(value)) is not None), None)


def padding_of(batch: Any) -> Padding | None:
    """The padding of a batch that is given as one tensor."""
    images = images_in(batch)
    return None if images is None else Padding.of(images.detach().to(torch.float32) if images.is_cpu else images)
