"""The data sets of a detector as a config wants them, and the batches it trains on."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from ..errors import UserError
from .coco import CocoDataset, resolve_dataset
from .columns import read_columns
from .sampler import TrainingBatchSampler, images_per_forward
from .transforms import test_transforms, train_transforms

EXAMPLES = 'shapes_train or "annotations.json:images"'


def training_set(cfg: CfgNode, name: str) -> CocoDataset:
    """Augmented images of data set `name`; UserError if none remains to train on."""
    options = cfg.DATALOADER
    dataset = CocoDataset(
        name,
        keep_empty=not options.FILTER_EMPTY_ANNOTATIONS,
        invalid_boxes=options.INVALID_BOXES,
        masks=cfg.MODEL.MASK_ON,
        trained_at=_largest_sizes(cfg),
        max_intensity=cfg.INPUT.MAX_INTENSITY,
        transforms=train_transforms(cfg),
    )
    if not len(dataset):
        raise UserError(
            f"data set {dataset.name} ({dataset.annotation_file}): no image remains to train on; give one with "
            "objects, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False if images without any are meant"
        )
    return dataset


def _largest_sizes(cfg: CfgNode) -> tuple[list[int], int] | None:
    """The shorter sides, and the largest longer side, at which an object under a pixel is never trained on."""
    if cfg.INPUT.RANDOM_IOU_CROP:  # which may enlarge any
        return None
    if cfg.INPUT.SCALE_JITTER:
        side = max(round(cfg.INPUT.SCALE_JITTER[1] * cfg.INPUT.MAX_SIZE_TRAIN), 1)
        return [side], side
    return list(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN


def evaluation_set(cfg: CfgNode, name: str) -> CocoDataset:
    """Images of data set `name` in their own size."""
    dataset = CocoDataset(
        name,
        invalid_boxes=cfg.DATALOADER.INVALID_BOXES,
        masks=cfg.MODEL.MASK_ON,  # a mistake shows now, and not when mask AP is computed
        max_intensity=cfg.INPUT.MAX_INTENSITY,
        transforms=test_transforms(cfg),
    )
    if not len(dataset):
        raise UserError(f"data set {dataset.name} ({dataset.annotation_file}): has no image to evaluate on; give one")
    dataset.masks = False  # checked, but not decoded
    return dataset


def class_names(name: str, *, must_exist: bool = False) -> list[str] | None:
    """The names of the categories of data set `name` in the order of their ids; None if it is not on this machine."""
    file, _ = resolve_dataset(name)
    if not must_exist and not file.is_file():
        return None
    return [category["name"] for category in read_columns(file).categories]


def shared_images(dataset: CocoDataset, name: str) -> int:
    """How many images of `dataset` are images of data set `name` too; 0 if that is not on this machine."""
    file, folder = resolve_dataset(name)
    if not file.is_file():
        return 0
    others = _paths(folder, read_columns(file).file_names)
    return sum(path in others for path in _paths(dataset.image_folder, dataset.records.file_names))


def _paths(folder: Path, names: Iterable[str]) -> set[str]:
    root = os.path.realpath(folder)
    return {os.path.normpath(os.path.join(root, name)) for name in names}


def wide_images(cfg: CfgNode, dataset: CocoDataset) -> np.ndarray:
    """Which images are wider than high, bool (n,), where batches do not mix shapes; else none."""
    group = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    return np.array([group and width > height for height, width in _sizes(dataset)])


def _sizes(dataset: Any) -> list[tuple[int, int]]:
    """(height, width) of each image; where a data set of others does not say it, as if all were square."""
    sizes: list[tuple[int, int]] = getattr(dataset, "sizes", None) or [(1, 1)] * len(dataset)
    return sizes


def batch_sampler(
    cfg: CfgNode, datasets: Sequence[CocoDataset], *, rank: int, world_size: int, start: int
) -> TrainingBatchSampler:
    """Which images of `datasets`, one after the other, form the batches of this rank."""
    return TrainingBatchSampler(
        [size for dataset in datasets for size in _sizes(dataset)],
        images_per_forward(cfg, world_size) * cfg.SOLVER.ACCUMULATE,
        seed=cfg.SEED,
        rank=rank,
        world_size=world_size,
        start=start,
        group=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )
