"""Transforms of an image together with its boxes and masks; all randomness is from torch's generator."""

import torch
from fvcore.common.config import CfgNode
from torchvision.transforms import v2


def train_transforms(cfg: CfgNode) -> v2.Transform:
    """Resize to a drawn shorter side, flip with probability `INPUT.RANDOM_FLIP`, drop objects under a pixel, [0, 1]."""
    return v2.Compose(
        [
            v2.RandomShortestSize(list(cfg.INPUT.MIN_SIZE_TRAIN), max_size=cfg.INPUT.MAX_SIZE_TRAIN),
            v2.RandomHorizontalFlip(p=cfg.INPUT.RANDOM_FLIP),
            # A box on the border leaves the image by a rounding error when resized: without the clamp it
            # would be taken for an invalid one and removed.
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def test_transforms(cfg: CfgNode) -> v2.Transform:
    """Only to float32 in [0, 1]: the model resizes in inference and returns boxes in the pixels it was given."""
    return v2.ToDtype(torch.float32, scale=True)
