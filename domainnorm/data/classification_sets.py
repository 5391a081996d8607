"""The data sets of a classifier as a config wants them, and the batches it trains on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch.utils.data import Sampler

from .class_sampler import ClassBatchSampler
from .classification import ClassificationDataset, read_class_names, resolve_classes
from .patches import COUNTS
from .sampler import TrainingBatchSampler
from .transforms import classifier_test_transforms, classifier_train_transforms

EXAMPLES = "patches_train, or a folder with one subfolder for each class"


def training_set(cfg: CfgNode, name: str) -> ClassificationDataset:
    """Augmented images of data set `name`."""
    return ClassificationDataset(name, classifier_train_transforms(cfg))


def evaluation_set(cfg: CfgNode, name: str) -> ClassificationDataset:
    """Images of data set `name`, square."""
    return ClassificationDataset(name, classifier_test_transforms(cfg))


def class_names(name: str, *, must_exist: bool = False) -> list[str] | None:
    """The names of the classes of data set `name`; None if it is not on this machine."""
    if not must_exist and name not in COUNTS and not all(path.exists() for path in resolve_classes(name)):
        return None
    return read_class_names(name)


def wide_images(cfg: CfgNode, dataset: ClassificationDataset) -> np.ndarray:
    """Which images are wider than high, bool (n,), where batches do not mix shapes: none, as all are square."""
    return np.zeros(len(dataset), dtype=bool)


def batch_sampler(
    cfg: CfgNode, datasets: Sequence[ClassificationDataset], *, rank: int, world_size: int, start: int
) -> Sampler[list[tuple[int, int]]]:
    """Which images of `datasets`, one after the other, form the batches of this rank."""
    labels = np.concatenate([dataset.labels.numpy() for dataset in datasets])
    size, parts = cfg.SOLVER.IMS_PER_BATCH // world_size, cfg.SOLVER.ACCUMULATE
    place: dict[str, Any] = {"seed": cfg.SEED, "rank": rank, "world_size": world_size, "start": start}
    if cfg.DATALOADER.BATCHES == "iid":
        return TrainingBatchSampler([(1, 1)] * len(labels), size, group=False, **place)
    return ClassBatchSampler(
        labels,
        size // parts,
        batches=cfg.DATALOADER.BATCHES,
        classes_per_batch=cfg.DATALOADER.CLASSES_PER_BATCH,
        with_replacement=cfg.DATALOADER.CLASSES_WITH_REPLACEMENT,
        parts=parts,
        **place,
    )
