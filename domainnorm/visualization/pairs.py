"""The objects of an image and the predictions of a model, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from .draw import draw_objects

MIN_SIDE, MAX_SIDE = 320, 512  # pixels of the longer side of one of the two
_GAP = 6


@dataclass(frozen=True)
class Objects:
    """What is drawn on an image.

    Args:
        boxes: (n, 4), XYXY in pixels.
        names: of each object.
        scores: None: of the ground truth.
        masks: bool (n, H, W).
    """

    boxes: Tensor
    names: Sequence[str]
    scores: Sequence[float] | None = None
    masks: Tensor | None = None


def side_by_side(image: Tensor, truth: Objects, predictions: Objects, classes: Sequence[str]) -> Tensor:
    """The image twice: with its objects on the left, with what was predicted on the right.

    Args:
        image: uint8 (3, H, W); it is enlarged or reduced so that its longer side has 320 to 512 pixels.
        classes: all names that there are, in the order of their colors.

    Returns:
        uint8 (3, H', W').
    """
    resized, halves = fit(image), []
    size = list(resized.shape[1:])
    for objects in (truth, predictions):
        masks = objects.masks
        if masks is not None and len(masks):
            masks = resize(masks.byte(), size, interpolation=InterpolationMode.NEAREST).bool()
        boxes = objects.boxes * torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
        halves.append(draw_objects(resized, boxes, objects.names, masks=masks, scores=objects.scores, classes=classes))
    return torch.cat([halves[0], torch.full((3, size[0], _GAP), 255, dtype=torch.uint8), halves[1]], dim=2)


def fit(image: Tensor) -> Tensor:
    """An image, uint8 (3, H, W), enlarged or reduced so that its longer side has 320 to 512 pixels."""
    longer = max(image.shape[1:])
    scale = min(max(longer, MIN_SIDE), MAX_SIDE) / longer
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    mode = InterpolationMode.NEAREST if scale > 1 else InterpolationMode.BILINEAR
    return resize(image, size, interpolation=mode, antialias=True)
