"""Boxes of a data set: within their images, in pixels, and large enough to train on."""

from collections.abc import Sequence

import numpy as np

_ENOUGH = 10  # boxes, of which it is no accident what they have in common


def clip_boxes(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4) inside images of (height, width) `sizes` (n, 2). One that is not finite has no area.

    Returns:
        XYXY float32 (n, 4); whether more than a pixel lay outside (n,); whether no area is left (n,).
    """
    xywh = np.where(np.isfinite(xywh).all(axis=1, keepdims=True), xywh, 0)
    with np.errstate(over="ignore"):  # to infinity, which is outside
        lower, upper = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    limit: np.ndarray = sizes[:, ::-1].astype(np.float64)
    beyond = np.any((lower < -1) | (upper > limit + 1), axis=1)
    clipped = [np.clip(corner, np.zeros_like(limit), limit) for corner in (lower, upper)]
    # float32 before the comparison: a sliver can round to no area
    boxes: np.ndarray = np.concatenate(clipped, axis=1).astype(np.float32)
    empty = np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
    return boxes, beyond, empty


def are_relative(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether boxes (n, 4), XYXY, are shares of the images' sides from 0 to 1, and not pixels."""
    return bool(len(boxes)) and bool((boxes <= 1).all()) and bool((sizes > 1).any())


def are_corners(values: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether four numbers (n, 4) of each box are two corners, where COCO has the left, the top, a width and a height.

    They are taken to be if most boxes would reach outside of their image, and no pair of corners does. A few boxes may
    do that by accident.
    """
    if len(values) < _ENOUGH:
        return False
    limit = sizes[:, ::-1] + 1
    inside = (values[:, :2] >= -1) & (values[:, 2:] <= limit) & (values[:, :2] < values[:, 2:])
    outside = (values[:, :2] + values[:, 2:] > limit).any(axis=1)
    return bool(inside.all()) and float(outside.mean()) > 0.5


def resized(sizes: np.ndarray, side: int, max_side: int) -> np.ndarray:
    """(height, width), int64 (n, 2), of images whose shorter side becomes `side`, the longer `max_side` at most.

    As torchvision rounds it, but that no side becomes 0.
    """
    ratios = np.minimum(side / sizes.min(axis=1, initial=2**63 - 1), max_side / sizes.max(axis=1, initial=1))
    return np.maximum((sizes * ratios[:, None]).astype(np.int64), 1)


def under_a_pixel(
    boxes: np.ndarray, sizes: np.ndarray, sides: Sequence[int], max_side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whether a side of boxes (n, 4), XYXY, is under a pixel when images of `sizes` (n, 2) are resized for training.

    Returns:
        At every one of the shorter `sides`, and at one of them at least: two of bool (n,).
    """
    least = np.stack([((boxes[:, 2:] - boxes[:, :2]) * _ratios(sizes, side, max_side)).min(axis=1) for side in sides])
    small: np.ndarray = least < 1 - 1e-4  # what is as good as a pixel is left to the rounding of the transform
    return np.all(small, axis=0), np.any(small, axis=0)


def _ratios(sizes: np.ndarray, side: int, max_side: int) -> np.ndarray:
    """The factors of width and height, (n, 2)."""
    return (resized(sizes, side, max_side) / sizes)[:, ::-1]
