"""The data sets of a classifier as a config wants them, and the batches it trains on."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch.utils.data import Sampler

from ..errors import UserError
from .arrays import held_out
from .catalog import VALIDATION, split_name
from .class_sampler import ClassBatchSampler
from .classification import ClassificationDataset, read_class_names, resolve_classes
from .patches import COUNTS
from .sampler import TrainingBatchSampler, images_per_forward
from .transforms import classifier_test_transforms, classifier_train_transforms

_MINIBATCHES = 4  # the name of a random stream that a seed starts; see class_sampler.py

EXAMPLES = "patches_train, or a folder with one subfolder for each class"


def training_set(cfg: CfgNode, name: str) -> ClassificationDataset:
    """Augmented images of data set `name`."""
    return _open(cfg, name, classifier_train_transforms(cfg))


def evaluation_set(cfg: CfgNode, name: str) -> ClassificationDataset:
    """Images of data set `name`, square."""
    return _open(cfg, name, classifier_test_transforms(cfg))


def _open(cfg: CfgNode, name: str, transforms: Any) -> ClassificationDataset:
    """The part of a data set that a config means: `NAME@validation` is what its training set NAME holds out."""
    whole = name.removesuffix(VALIDATION)
    dataset = ClassificationDataset(whole, transforms, cfg.INPUT.MAX_INTENSITY)
    trained = [split_name(entry)[1] for entry in cfg.DATASETS.TRAIN]
    if split_name(whole)[1] in trained and cfg.DATASETS.VALIDATION:
        validation = held_out(dataset.labels.numpy(), cfg.DATASETS.VALIDATION)
        dataset.keep(validation if whole != name else ~validation)
        dataset.name = name
        if not len(dataset):
            raise UserError(
                f"data set {name}: DATASETS.VALIDATION {cfg.DATASETS.VALIDATION:g} leaves no image in it; "
                "choose another share"
            )
    elif whole != name:
        raise UserError(
            f"data set {name}: is what DATASETS.VALIDATION, a share, holds out of one of DATASETS.TRAIN; got "
            f"VALIDATION {cfg.DATASETS.VALIDATION:g} and TRAIN {cfg.DATASETS.TRAIN}"
        )
    return dataset


def class_names(name: str, *, must_exist: bool = False) -> list[str] | None:
    """The names of the classes of data set `name`; None if it is not on this machine."""
    _, name = split_name(name.removesuffix(VALIDATION))
    if not must_exist and name not in COUNTS and not all(path.exists() for path in resolve_classes(name)):
        return None
    return read_class_names(name)


def shared_images(dataset: ClassificationDataset, name: str) -> int:
    """How many images of `dataset` are images of data set `name` too; what is held out of it is not."""
    own, others = ([os.path.realpath(path) for path in resolve_classes(each)] for each in (dataset.name, name))
    if dataset.name.endswith(VALIDATION):
        return 0
    parts = {split_name(each)[1].rpartition("_")[2] for each in (dataset.name, name)}  # archives have several sets
    if own == others and len(parts) == 1:
        return len(dataset)
    if not dataset.folder or not os.path.isdir(others[0]):
        return 0
    files = (os.path.normpath(os.path.join(own[0], file)) for file in dataset.files)
    return sum(file.startswith(os.path.join(others[0], "")) for file in files)


def wide_images(cfg: CfgNode, dataset: ClassificationDataset) -> np.ndarray:
    """Which images are wider than high, bool (n,), where batches do not mix shapes: none, as all are square."""
    return np.zeros(len(dataset), dtype=bool)


def batch_sampler(
    cfg: CfgNode, datasets: Sequence[ClassificationDataset], *, rank: int, world_size: int, start: int
) -> Sampler[list[tuple[int, int]]]:
    """Which images of `datasets`, one after the other, form the batches of this rank."""
    size, parts = images_per_forward(cfg, world_size), cfg.SOLVER.ACCUMULATE
    place: dict[str, Any] = {"seed": cfg.SEED, "rank": rank, "world_size": world_size, "start": start}
    if cfg.DATALOADER.BATCHES == "iid":
        return TrainingBatchSampler([(1, 1)] * sum(map(len, datasets)), size * parts, group=False, **place)
    if any(not hasattr(dataset, "labels") for dataset in datasets):
        raise UserError(
            f"DATALOADER.BATCHES {cfg.DATALOADER.BATCHES!r} needs the labels of all images before they are read: give "
            "train_data an attribute `labels`, int64 (N,), or choose iid"
        )
    return ClassBatchSampler(
        np.concatenate([np.asarray(dataset.labels) for dataset in datasets]),
        size,
        batches=cfg.DATALOADER.BATCHES,
        classes_per_batch=cfg.DATALOADER.CLASSES_PER_BATCH,
        with_replacement=cfg.DATALOADER.CLASSES_WITH_REPLACEMENT,
        parts=parts,
        **place,
    )


def minibatch_size(cfg: CfgNode, world_size: int) -> int:
    """How many images are normalized together in inference: `TEST.MINIBATCH_SIZE`, or as many as in training."""
    backbone, norms = cfg.MODEL.BACKBONE.NORM, cfg.MODEL.NORM
    synced = backbone == "SyncBN" or (backbone == "BGN" and norms.BGN.SYNC) or (backbone == "BRN" and norms.BRN.SYNC)
    group = (norms.SYNC_GROUP_SIZE or world_size) if synced else 1  # of processes that normalize together
    own = cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.ACCUMULATE * max(world_size // group, 1))
    return cfg.TEST.MINIBATCH_SIZE or max(own, 1) + cfg.SOLVER.VIRTUAL_BATCH * group


def minibatches(cfg: CfgNode, labels: np.ndarray, size: int) -> list[list[int]]:
    """Batches of `size` images of a data set to evaluate on, the same in every evaluation.

    With `TEST.BATCHES` "iid" each image comes once, in random order; where `size` does not divide their number, the
    batches are smaller, and as equal as can be. With "training" they are made as `DATALOADER.BATCHES` makes them, about
    as many images in all, of which some may come twice and others never.
    """
    number = -(-len(labels) // size)
    if cfg.TEST.BATCHES == "iid" or cfg.DATALOADER.BATCHES == "iid":
        order = np.random.default_rng([_MINIBATCHES, cfg.SEED]).permutation(len(labels))
        return [part.tolist() for part in np.array_split(order, number)]
    sampler = ClassBatchSampler(
        labels,
        size,
        batches=cfg.DATALOADER.BATCHES,
        classes_per_batch=cfg.DATALOADER.CLASSES_PER_BATCH,
        with_replacement=cfg.DATALOADER.CLASSES_WITH_REPLACEMENT,
        seed=cfg.SEED,
    )
    return [[index for index, _ in batch] for batch in itertools.islice(sampler, number)]
