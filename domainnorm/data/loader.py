"""Batches for training and evaluation, on this rank."""

from collections.abc import Generator, Iterator
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ..errors import UserError
from .coco import CocoDataset, resolve_dataset
from .sampler import TrainingBatchSampler, evaluation_indices
from .table import read_categories
from .transforms import test_transforms, train_transforms

Sample = tuple[torch.Tensor, dict[str, Any]]
Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]


def train_loader(cfg: CfgNode, *, rank: int, world_size: int, start_iteration: int = 0) -> Generator[Batch, None, None]:
    """The infinite batches of this rank: `(images, targets)`, lists of `IMS_PER_BATCH // world_size`.

    Images are float32 (3, H, W) in [0, 1], of different sizes; targets are those of `CocoDataset`, as plain tensors,
    with masks if `MODEL.MASK_ON`. Which image comes when, and how it is augmented, depends on `SEED` and the position
    only: not on the number of workers, nor on whether the run began at `start_iteration` or came there. Closing the
    generator ends the workers.

    Raises:
        UserError: here, for the config and the annotations; from the iterator, for an image.
    """
    total, ways = cfg.SOLVER.IMS_PER_BATCH, world_size * cfg.SOLVER.ACCUMULATE
    if total % ways:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {total} cannot be shared equally by {world_size} processes with "
            f"SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE}; use a multiple of {ways}"
        )
    datasets = _training_datasets(cfg)
    sampler = TrainingBatchSampler(
        [size for dataset in datasets for size in dataset.sizes],
        total // world_size,
        seed=cfg.SEED,
        rank=rank,
        world_size=world_size,
        start=start_iteration,
        group=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )
    return _batches(_loader(_Seeded(ConcatDataset(datasets)), sampler, cfg.DATALOADER.NUM_WORKERS))


class EvaluationLoader:
    """This rank's part of a data set, once and in order; iterating gives batches as `train_loader`'s.

    Attributes:
        dataset: the whole `CocoDataset`, for its `annotation_file` and `category_ids`.
        indices: this rank's part of it; may be empty.
    """

    def __init__(self, dataset: CocoDataset, indices: range, batch_size: int, num_workers: int) -> None:
        self.dataset = dataset
        self.indices = indices
        self.batches = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        self.num_workers = num_workers

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        workers = min(self.num_workers, len(self.batches))
        return _batches(_loader(_Caught(self.dataset), self.batches, workers))


def test_loader(cfg: CfgNode, name: str, *, rank: int, world_size: int) -> EvaluationLoader:
    """The images of data set `name` that this rank evaluates, `TEST.IMS_PER_BATCH` a batch, in their own size.

    Its targets have no masks: evaluation takes them from the annotation file.

    Raises:
        UserError: here, for the annotations, also if `MODEL.MASK_ON` and they have no masks; when iterated, for an
            image.
    """
    dataset = CocoDataset(
        name,
        invalid_boxes=cfg.DATALOADER.INVALID_BOXES,
        masks=cfg.MODEL.MASK_ON,  # a mistake shows now, and not when mask AP is computed
        transforms=test_transforms(cfg),
    )
    dataset.masks = False  # checked, but not decoded
    _check_classes(cfg, dataset)
    if cfg.DATASETS.TRAIN and (trained := resolve_dataset(cfg.DATASETS.TRAIN[0])[0]).is_file():
        names = [category["name"] for category in read_categories(trained)]
        if names != dataset.class_names:
            raise UserError(
                f"DATASETS.TEST: {name} has the categories {dataset.class_names}, the model is trained on {names}; "
                "they must be equal, in the order of their ids"
            )
    indices = evaluation_indices(len(dataset), rank, world_size)
    return EvaluationLoader(dataset, indices, cfg.TEST.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS)


def num_classes(cfg: CfgNode) -> int:
    """What the config says or, where it says 0, the number of categories of its first training (else test) set.

    Raises:
        UserError: 0 and no data set, or its annotation file is missing or broken.
    """
    key, number = _classes_option(cfg)
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    if not number and not names:
        raise UserError(f"DATASETS.TRAIN and DATASETS.TEST are empty; name a data set, or set {key}")
    return number or len(read_categories(resolve_dataset(names[0])[0]))


def _classes_option(cfg: CfgNode) -> tuple[str, int]:
    """The key that gives the architecture its number of classes, and the number; 0: the data set's."""
    head = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    return f"MODEL.{head}.NUM_CLASSES", cfg.MODEL[head].NUM_CLASSES


def _training_datasets(cfg: CfgNode) -> list[CocoDataset]:
    if not cfg.DATASETS.TRAIN:
        raise UserError('DATASETS.TRAIN is empty; name a data set, such as shapes_train or "annotations.json:images"')
    options = cfg.DATALOADER
    datasets = [
        CocoDataset(
            name,
            keep_empty=not options.FILTER_EMPTY_ANNOTATIONS,
            invalid_boxes=options.INVALID_BOXES,
            masks=cfg.MODEL.MASK_ON,
            transforms=train_transforms(cfg),
        )
        for name in cfg.DATASETS.TRAIN
    ]
    for dataset in datasets:
        if not len(dataset):
            raise UserError(
                f"data set {dataset.name} ({dataset.annotation_file}): no image remains to train on; give one with "
                "objects, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False if images without any are meant"
            )
        _check_classes(cfg, dataset)
        if dataset.class_names != datasets[0].class_names:
            raise UserError(
                f"DATASETS.TRAIN: {datasets[0].name} has the categories {datasets[0].class_names}, {dataset.name} has "
                f"{dataset.class_names}; they must be equal, in the order of their ids, to train on both"
            )
    return datasets


def _check_classes(cfg: CfgNode, dataset: CocoDataset) -> None:
    key, classes = _classes_option(cfg)
    if classes and len(dataset.categories) > classes:
        raise UserError(
            f"{key} {classes} contradicts {dataset.annotation_file}, which has "
            f"{len(dataset.categories)} categories; raise it, or set it to 0 to take the data set's number"
        )


def _loader(dataset: Dataset[Any], batches: Any, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        # Its own generator: by default a loader draws from the global one, and a resumed run would draw twice.
        generator=torch.Generator(),
    )


def _batches(loader: DataLoader[Any]) -> Generator[Batch, None, None]:
    iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        del iterator  # its last reference, even while a traceback holds this frame: the workers end here


def _collate(samples: list[Sample | UserError]) -> Batch | UserError:
    images, targets = [], []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        images.append(_plain(sample[0]))
        targets.append({key: _plain(value) for key, value in sample[1].items()})
    return images, targets


def _plain(value: Any) -> Any:
    """A tensor without its subclass: transforms are done, and models need no boxes that know their format."""
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value


class _Caught(Dataset[Any]):
    """A user's mistake as a value: raised in a worker it would come out wrapped in the worker's traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


class _Seeded(_Caught):
    """Takes (index, seed); the augmentation draws from that seed and leaves the global generator as it was."""

    def __getitem__(self, index: Any) -> Any:
        position, seed = index
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also reseed the GPUs of a process that loads without workers.
            torch.default_generator.manual_seed(seed)
            return super().__getitem__(position)
