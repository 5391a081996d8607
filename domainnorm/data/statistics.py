"""What a data set has, in numbers: images, objects of each class, sizes of boxes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from .boxes import resized
from .classification import ClassificationDataset
from .coco import CocoDataset

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class SetStatistics:
    """The statistics of one data set, as it is used.

    Attributes:
        images: their number.
        class_names, class_counts: of each class, its objects, int64; of a classifier its images.
        absent: the classes that its file has, and of which it has nothing.
        crowds: their number.
        objects: of each image, int64 (images,).
        boxes: of all objects, in their images as they are resized: XYXY, float32 (n, 4).
        sizes: (height, width) of the resized image of each object, int64 (n, 2).
        counts: what was left out or changed, by its rule.
    """

    name: str
    images: int
    class_names: Sequence[str] = ()
    class_counts: np.ndarray = field(default_factory=lambda: _NONE)
    absent: Sequence[str] = ()
    crowds: int = 0
    objects: np.ndarray = field(default_factory=lambda: _NONE)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), dtype=np.float32))
    sizes: np.ndarray = field(default_factory=lambda: _NONE.reshape(0, 2))
    counts: dict[str, int] = field(default_factory=dict)


def statistics_of(dataset: Any, side: int, max_side: int) -> SetStatistics:
    """The statistics of a data set; of one that is not of this library, the number of its images alone.

    Args:
        side, max_side: the shorter and the largest longer side that images are resized to.
    """
    if isinstance(dataset, ClassificationDataset):
        counts = np.bincount(dataset.labels.numpy(), minlength=len(dataset.class_names))
        return SetStatistics(dataset.name, len(dataset), dataset.class_names, counts, _absent(dataset, counts))
    if not isinstance(dataset, CocoDataset):
        return SetStatistics(getattr(dataset, "name", type(dataset).__name__), len(dataset))
    records, columns = dataset.records, dataset.records.columns
    rows = np.flatnonzero(records.kept)
    images, sizes = columns.images[rows], columns.sizes[columns.images[rows]]
    new = resized(sizes, side, max_side)
    scale = (new / sizes)[:, ::-1].astype(np.float32)
    counts = np.bincount(records.labels[rows], minlength=len(dataset.class_names))
    return SetStatistics(
        name=dataset.name,
        images=len(dataset),
        class_names=dataset.class_names,
        class_counts=counts,
        absent=_absent(dataset, counts),
        crowds=int(columns.crowds.sum()),
        objects=np.bincount(images, minlength=len(columns.image_ids))[records.images],
        boxes=records.boxes[rows] * np.tile(scale, 2),
        sizes=new,
        counts=records.counts,
    )


def _absent(dataset: Any, counts: np.ndarray) -> list[str]:
    ids = getattr(dataset, "category_ids", range(len(counts)))  # None of a class of the model that the file has not
    found = zip(dataset.class_names, counts, ids, strict=True)
    return [name for name, count, id_ in found if not count and id_ is not None]


def training_size(cfg: CfgNode) -> tuple[int, int]:
    """The shorter side below which as many are drawn as above, and the largest longer side."""
    if cfg.INPUT.SCALE_JITTER:
        side = max(round(sum(cfg.INPUT.SCALE_JITTER) / 2 * cfg.INPUT.MAX_SIZE_TRAIN), 1)
        return side, side
    sides = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    return sides[len(sides) // 2], cfg.INPUT.MAX_SIZE_TRAIN
