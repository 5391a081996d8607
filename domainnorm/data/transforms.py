"""Transforms of an image, of a detector's together with boxes and masks; all randomness is from torch's generator."""

from typing import Any

import torch
from fvcore.common.config import CfgNode
from torchvision.transforms import v2


def train_transforms(cfg: CfgNode) -> v2.Transform:
    """Resize to a drawn shorter side, flip with probability `INPUT.RANDOM_FLIP`, drop objects under a pixel, [0, 1]."""
    return v2.Compose(
        [
            ShortestSize(list(cfg.INPUT.MIN_SIZE_TRAIN), max_size=cfg.INPUT.MAX_SIZE_TRAIN),
            v2.RandomHorizontalFlip(p=cfg.INPUT.RANDOM_FLIP),
            # A box on the border leaves the image by a rounding error when resized: without the clamp it
            # would be taken for an invalid one and removed.
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


class ShortestSize(v2.RandomShortestSize):
    """torchvision's, but that no side becomes 0."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(side, 1) for side in params["size"])}


class NotTooNarrow(v2.Transform):
    """Cuts the ends off images that are longer than 16 times their shorter side: resized, they would fill the memory.

    The centre, which is cropped next, is far from there.
    """

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        height, width = image.shape[-2:]
        longest = 16 * min(height, width)
        if max(height, width) <= longest:
            return image
        return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])


def test_transforms(cfg: CfgNode) -> v2.Transform:
    """Only to float32 in [0, 1]: the model resizes in inference and returns boxes in the pixels it was given."""
    return v2.ToDtype(torch.float32, scale=True)


def classifier_train_transforms(cfg: CfgNode) -> v2.Transform:
    """To `INPUT.CROP_SIZE` square as `INPUT.CROP` says, flip with probability `INPUT.RANDOM_FLIP`, [0, 1]."""
    side = cfg.INPUT.CROP_SIZE
    crop = {
        "random_resized": [v2.RandomResizedCrop(side)],
        "padded": [v2.Resize((side, side)), v2.RandomCrop(side, padding=side // 8)],
        "none": [v2.Resize((side, side))],
    }[cfg.INPUT.CROP]
    cutout = [Cutout(cfg.INPUT.CUTOUT, list(cfg.MODEL.PIXEL_MEAN))] if cfg.INPUT.CUTOUT else []
    flip = v2.RandomHorizontalFlip(p=cfg.INPUT.RANDOM_FLIP)
    return v2.Compose([*crop, flip, v2.ToDtype(torch.float32, scale=True), *cutout])


class Cutout(v2.Transform):
    """A square of the mean color around a random pixel, cut at the border (DeVries & Taylor, 2017).

    Args:
        side: of the square, in pixels.
        color: R, G and B, in [0, 1].
    """

    def __init__(self, side: int, color: list[float]) -> None:
        super().__init__()
        self.side = side
        self.color = color

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        center = [int(torch.randint(size, ())) for size in (height, width)]
        (top, left), (bottom, right) = (
            [min(max(at + offset, 0), size) for at, size in zip(center, (height, width), strict=True)]
            for offset in (-(self.side // 2), self.side - self.side // 2)
        )
        return {"i": top, "j": left, "h": bottom - top, "w": right - left}

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        color = torch.tensor(self.color).view(3, 1, 1)
        return v2.functional.erase(image, **params, v=color)


def classifier_test_transforms(cfg: CfgNode) -> v2.Transform:
    """To `INPUT.CROP_SIZE` square, [0, 1]: the centre at ImageNet's 224 of 256, or the whole image."""
    side = cfg.INPUT.CROP_SIZE
    centre = [NotTooNarrow(), v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
    return v2.Compose(
        [
            *(centre if cfg.INPUT.CROP == "random_resized" else [v2.Resize((side, side))]),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
