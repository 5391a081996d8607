"""COCO segmentations (polygons, uncompressed and compressed RLE): check and decode."""

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def segmentation_problem(segmentation: Any, size: tuple[int, int]) -> str:
    """What is wrong with the segmentation of an object in an image of (height, width) `size`; "" if nothing is."""
    if isinstance(segmentation, list):
        if not segmentation or not all(map(_is_polygon, segmentation)):
            return "is not a list of polygons, each of at least three points x, y"
        # Far outside, pycocotools would take all memory.
        far = [c for polygon in segmentation for c in polygon if abs(c) > 10 * max(size)]
        return f"has a point at {far[0]:g}, far outside the image" if far else ""
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "is neither a list of polygons nor an RLE with size and counts"
    if segmentation["size"] != list(size):
        return f"is an RLE of size {segmentation['size']}, the image has {list(size)} (height, width)"
    counts = segmentation["counts"]
    if isinstance(counts, list):
        pixels = sum(counts) if all(isinstance(count, int) and count >= 0 for count in counts) else -1
        if pixels != size[0] * size[1]:
            return f"has RLE counts that do not add up to the image's {size[0] * size[1]} pixels"
    elif not isinstance(counts, str):
        return "has RLE counts that are neither a list nor a string"
    return ""


def _is_polygon(polygon: Any) -> bool:
    # Checked here because pycocotools takes four numbers for a box and ignores the last of an odd number.
    return (
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(isinstance(coordinate, (int, float)) and math.isfinite(coordinate) for coordinate in polygon)
    )


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """The mask of one object: uint8, (H, W), values 0 and 1.

    Raises:
        ValueError: a compressed RLE that does not describe an image of this size.
    """
    height, width = size
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
        check_compressed(rle["counts"], size)
    return coco_mask.decode(rle)


def check_compressed(counts: str, size: tuple[int, int]) -> None:
    """That a compressed RLE is one of an image of (height, width) `size`.

    Where it is too short, pycocotools would leave the rest of the mask uninitialized, and compare masks for ever.

    Raises:
        ValueError: it is not.
    """
    runs = _runs(counts)
    if min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        raise ValueError(f"its RLE counts do not add up to {size[0] * size[1]} pixels")


def _runs(counts: str) -> list[int]:
    """The run lengths of a compressed RLE: 5 bits a character; from the fourth run on, less the last but one."""
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii"):
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number; its highest bit is the sign
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its RLE counts end within a number")
    return runs
