"""Transforms of an image, of a detector's together with boxes and masks; all randomness is from torch's generator."""

from typing import Any

import torch
from fvcore.common.config import CfgNode
from torchvision.transforms import v2


def train_transforms(cfg: CfgNode) -> v2.Transform:
    """Crop, resize, flip and colours by the keys of `INPUT`; objects under a pixel are dropped; [0, 1]."""
    options = cfg.INPUT
    crop = [v2.RandomApply([IoUCrop()], p=options.RANDOM_IOU_CROP)] if options.RANDOM_IOU_CROP else []
    resize = [ShortestSize(list(options.MIN_SIZE_TRAIN), max_size=options.MAX_SIZE_TRAIN)]
    if options.SCALE_JITTER:
        side = options.MAX_SIZE_TRAIN
        resize = [ScaleJitter((side, side), tuple(options.SCALE_JITTER)), CropLonger(side)]
    return v2.Compose(
        [
            *crop,
            *resize,
            *_flips(cfg),
            # A box on the border leaves the image by a rounding error when resized: without the clamp it
            # would be taken for an invalid one and removed.
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(),
            *_colors(cfg),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def _flips(cfg: CfgNode) -> list[v2.Transform]:
    vertical = cfg.INPUT.RANDOM_VERTICAL_FLIP
    # None where there is none: it would draw a number, and all that come after would be others.
    return [v2.RandomHorizontalFlip(p=cfg.INPUT.RANDOM_FLIP), *([v2.RandomVerticalFlip(vertical)] if vertical else [])]


def _colors(cfg: CfgNode) -> list[v2.Transform]:
    probability = cfg.INPUT.PHOTOMETRIC_DISTORT
    return [v2.RandomPhotometricDistort(p=probability)] if probability else []


class ShortestSize(v2.RandomShortestSize):
    """torchvision's, but that no side becomes 0."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(side, 1) for side in params["size"])}


class ScaleJitter(v2.ScaleJitter):
    """torchvision's, but that no side becomes 0."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(side, 1) for side in params["size"])}


class IoUCrop(v2.RandomIoUCrop):
    """torchvision's, but that an image of up to three pixels stays whole: a crop of it may be empty."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) if min(v2.query_size(flat_inputs)) > 3 else {}


class CropLonger(v2.Transform):
    """A random part of images with a side longer than `side`, in which that side is as long."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sizes = v2.query_size(flat_inputs)
        height, width = (min(size, self.side) for size in sizes)
        top, left = (int(torch.randint(size - kept + 1, ())) for size, kept in zip(sizes, (height, width), strict=True))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        return v2.functional.crop(image, **params)


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
    """To `INPUT.CROP_SIZE` square as `INPUT.CROP` says, flips and colours by the keys of `INPUT`, [0, 1]."""
    side = cfg.INPUT.CROP_SIZE
    crop = {
        "random_resized": [v2.RandomResizedCrop(side)],
        "padded": [v2.Resize((side, side)), v2.RandomCrop(side, padding=side // 8)],
        "none": [v2.Resize((side, side))],
    }[cfg.INPUT.CROP]
    cutout = [Cutout(cfg.INPUT.CUTOUT, list(cfg.MODEL.PIXEL_MEAN))] if cfg.INPUT.CUTOUT else []
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*crop, *_flips(cfg), *_colors(cfg), to_float, *cutout])


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
