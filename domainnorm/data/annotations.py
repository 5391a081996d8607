"""A COCO annotation file as checked records, one for each image."""

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .masks import segmentation_problem
from .table import Table, read_json, sorted_categories

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """What is known of one image before it is read; its objects are in the order of the file."""

    image_id: int
    file_name: str
    domain: str  # "" if the file names none
    size: tuple[int, int]  # height, width
    boxes: np.ndarray  # (n, 4) float32, XYXY, inside the image, of positive area
    labels: np.ndarray  # (n,) int64, positions in the list of categories
    annotation_ids: np.ndarray  # (n,) int64
    # A list of n COCO segmentations, pickled: forked workers share bytes, but copy objects by counting references.
    segmentations: bytes | None


def read_annotations(
    file: Path, *, invalid_boxes: str = "error", masks: bool = False
) -> tuple[list[dict[str, Any]], list[ImageRecord]]:
    """The categories, sorted by id, and the record of each image, in the order of the file.

    Crowd annotations are left out. A box up to a pixel beyond its image is clipped. What is further beyond or has no
    area is an error, or with `invalid_boxes="skip"` clipped and, if no area is left, dropped; with `masks`, so is an
    object whose segmentation cannot be decoded.

    Raises:
        UserError: missing or broken file or entry, id used twice, unknown image or category, invalid box.
    """
    data = read_json(file)
    images = Table(file, data, "images")
    objects = Table(file, data, "annotations")
    categories = sorted_categories(Table(file, data, "categories"))

    image_ids = images.unique_integers("id")
    file_names = images.strings("file_name")
    domains = images.strings("domain", default="")
    sizes = _image_sizes(images)

    ids = objects.unique_integers("id")
    image_of = _positions(objects, "image_id", among=image_ids, entries="images")
    category_ids = np.array([int(category["id"]) for category in categories])
    labels = _positions(objects, "category_id", among=category_ids, entries="categories")
    xywh = objects.quadruples("bbox")
    crowd = objects.integers("iscrowd", default=0) != 0
    boxes, beyond, empty = clip_boxes(xywh, sizes[image_of])
    undecodable = np.zeros_like(crowd)

    def refuse(row: int, what: str) -> None:
        height, width = sizes[image_of[row]]
        raise UserError(
            f"annotation file {file}: annotation {ids[row]} (image {file_names[image_of[row]]}, {width} x {height} "
            f"pixels): {what}; correct it, or set DATALOADER.INVALID_BOXES skip to clip or drop what is invalid"
        )

    invalid = np.flatnonzero(~crowd & (beyond | empty))
    if len(invalid) and invalid_boxes == "error":
        row = int(invalid[0])
        what = "reaches outside the image" if beyond[row] else "has no area in the image"
        others = f" ({len(invalid) - 1} more boxes are invalid)" if len(invalid) > 1 else ""
        refuse(row, f"its box {xywh[row].tolist()} (x, y, width, height) {what}{others}")
    if masks and len(objects.entries) and not any(entry.get("segmentation") for entry in objects.entries):
        raise UserError(
            f"annotation file {file}: none of its {len(objects.entries)} objects has a segmentation, which masks need; "
            "name another data set, or set MODEL.MASK_ON False"
        )
    for row in np.flatnonzero(~crowd).tolist() if masks else ():
        problem = segmentation_problem(objects.entries[row].get("segmentation"), _size(sizes[image_of[row]]))
        undecodable[row] = bool(problem)
        if problem and invalid_boxes == "error":
            refuse(row, f"its segmentation {problem}")

    kept = ~crowd & ~empty & ~undecodable
    clipped, dropped = int((kept & beyond).sum()), int((~crowd & ~kept).sum())
    if clipped or dropped:
        logger.warning("%s: %d boxes clipped to their image, %d objects dropped as invalid", file, clipped, dropped)

    rows_by_image = np.flatnonzero(kept)
    rows_by_image = rows_by_image[np.argsort(image_of[rows_by_image], kind="stable")]
    ends = np.cumsum(np.bincount(image_of[rows_by_image], minlength=len(image_ids)))
    records = []
    for image, end in enumerate(ends):
        rows = rows_by_image[ends[image - 1] if image else 0 : end]
        records.append(
            ImageRecord(
                image_id=int(image_ids[image]),
                file_name=file_names[image],
                domain=domains[image],
                size=_size(sizes[image]),
                boxes=boxes[rows],
                labels=labels[rows],
                annotation_ids=ids[rows],
                segmentations=pickle.dumps([objects.entries[row]["segmentation"] for row in rows]) if masks else None,
            )
        )
    return categories, records


def clip_boxes(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4) inside images of (height, width) `sizes` (n, 2). One that is not finite has no area.

    Returns:
        XYXY float32 (n, 4); whether more than a pixel lay outside (n,); whether no area is left (n,).
    """
    xywh = np.where(np.isfinite(xywh).all(axis=1, keepdims=True), xywh, 0)
    lower, upper = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    limit: np.ndarray = sizes[:, ::-1].astype(np.float64)
    beyond = np.any((lower < -1) | (upper > limit + 1), axis=1)
    clipped = [np.clip(corner, np.zeros_like(limit), limit) for corner in (lower, upper)]
    # float32 before the comparison: a sliver can round to no area
    boxes: np.ndarray = np.concatenate(clipped, axis=1).astype(np.float32)
    empty = np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
    return boxes, beyond, empty


def _image_sizes(images: Table) -> np.ndarray:
    """(height, width) of each image: int64 (n, 2)."""
    sizes = np.stack([images.integers("height"), images.integers("width")], axis=1)
    bad = (sizes < 1).any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"annotation file {images.file}: images[{row}] ({images.entries[row]['file_name']}) has width "
            f"{sizes[row, 1]} and height {sizes[row, 0]}; expected positive numbers of pixels"
        )
    return sizes


def _positions(table: Table, key: str, among: np.ndarray, entries: str) -> np.ndarray:
    """Where in `among` each value of column `key` is; UserError if it is not there."""
    values = table.integers(key)
    if not len(values):
        return values
    found = np.full(len(values), -1)
    if len(among):
        order = np.argsort(among)
        nearest = order[np.searchsorted(among, values, sorter=order).clip(max=len(among) - 1)]
        found = np.where(among[nearest] == values, nearest, -1)
    if (found < 0).any():
        row = int((found < 0).argmax())
        raise UserError(
            f"annotation file {table.file}: annotation {table.entries[row]['id']} has {key} {values[row]}, "
            f"which is not in its list of {entries}; correct the {key} or add the entry"
        )
    return found


def _size(pair: np.ndarray) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])
