"""Batches for training and evaluation, on this rank."""

from collections.abc import Generator, Iterator
from types import ModuleType
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ..errors import UserError
from . import classification_sets, detection_sets
from .classification import ClassificationDataset
from .coco import CocoDataset
from .sampler import evaluation_indices

Sample = tuple[torch.Tensor, dict[str, Any]]
AnySet = CocoDataset | ClassificationDataset
Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]


def train_loader(cfg: CfgNode, *, rank: int, world_size: int, start_iteration: int = 0) -> Generator[Batch, None, None]:
    """The infinite batches of this rank: `(images, targets)`, lists of `IMS_PER_BATCH // world_size`.

    Images are float32 (3, H, W) in [0, 1], a detector's of different sizes; targets are those of `CocoDataset`, with
    masks if `MODEL.MASK_ON`, or of `ClassificationDataset`, as plain tensors. Which image comes when, and how it is
    augmented, depends on `SEED` and the position only: not on the number of workers, nor on whether the run began at
    `start_iteration` or came there. Closing the generator ends the workers.

    Raises:
        UserError: here, for the config and the annotations; from the iterator, for an image.
    """
    total, ways = cfg.SOLVER.IMS_PER_BATCH, world_size * cfg.SOLVER.ACCUMULATE
    if total % ways:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {total} cannot be shared equally by {world_size} processes with "
            f"SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE}; use a multiple of {ways}"
        )
    datasets = _training_sets(cfg)
    sampler = _kind(cfg).batch_sampler(cfg, datasets, rank=rank, world_size=world_size, start=start_iteration)
    return _batches(_loader(_Seeded(ConcatDataset(datasets)), sampler, cfg.DATALOADER.NUM_WORKERS))


class EvaluationLoader:
    """This rank's part of a data set, once and in order; iterating gives batches as `train_loader`'s.

    Attributes:
        dataset: the whole `CocoDataset` or `ClassificationDataset`.
        indices: this rank's part of it; may be empty.
    """

    def __init__(self, dataset: Any, indices: range, batch_size: int, num_workers: int) -> None:
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
    """The images of data set `name` that this rank evaluates, `TEST.IMS_PER_BATCH` a batch.

    A detector's images are in their own size, a classifier's square. Targets have no masks: evaluation takes them from
    the annotation file.

    Raises:
        UserError: here, for the annotations, also if `MODEL.MASK_ON` and they have no masks, and for classes that are
            not those of training; when iterated, for an image.
    """
    dataset = _kind(cfg).evaluation_set(cfg, name)
    _check_number_of_classes(cfg, dataset)
    trained = _kind(cfg).class_names(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
    if trained not in (None, dataset.class_names):
        raise UserError(
            f"DATASETS.TEST: {name} has the categories {dataset.class_names}, the model is trained on {trained}; "
            "they must be equal, in the same order"
        )
    indices = evaluation_indices(len(dataset), rank, world_size)
    return EvaluationLoader(dataset, indices, cfg.TEST.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS)


def num_classes(cfg: CfgNode) -> int:
    """What the config says or, where it says 0, the number of classes of its first training (else test) set.

    Raises:
        UserError: 0 and no data set, or it is missing or broken.
    """
    key, number = _classes_option(cfg)
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    if not number and not names:
        raise UserError(f"DATASETS.TRAIN and DATASETS.TEST are empty; name a data set, or set {key}")
    return number or len(_kind(cfg).class_names(names[0], must_exist=True))


def domain_names(cfg: CfgNode) -> list[str]:
    """The domains of the training sets, in order of first appearance."""
    return list(dict.fromkeys(cfg.DATASETS.DOMAINS))


def _kind(cfg: CfgNode) -> ModuleType:
    """The module that opens the data sets of the architecture and says what forms a batch."""
    return classification_sets if cfg.MODEL.META_ARCHITECTURE == "Classifier" else detection_sets


def _classes_option(cfg: CfgNode) -> tuple[str, int]:
    """The key that gives the architecture its number of classes, and the number; 0: the data set's."""
    node = {"RetinaNet": "RETINANET", "GeneralizedRCNN": "ROI_HEADS", "Classifier": "CLASSIFIER"}[
        cfg.MODEL.META_ARCHITECTURE
    ]
    return f"MODEL.{node}.NUM_CLASSES", cfg.MODEL[node].NUM_CLASSES


def _training_sets(cfg: CfgNode) -> list[AnySet]:
    if not cfg.DATASETS.TRAIN:
        raise UserError(f"DATASETS.TRAIN is empty; name a data set, such as {_kind(cfg).EXAMPLES}")
    datasets = [_kind(cfg).training_set(cfg, name) for name in cfg.DATASETS.TRAIN]
    for dataset in datasets:
        _check_number_of_classes(cfg, dataset)
        if dataset.class_names != datasets[0].class_names:
            raise UserError(
                f"DATASETS.TRAIN: {datasets[0].name} has the categories {datasets[0].class_names}, {dataset.name} has "
                f"{dataset.class_names}; they must be equal, in the same order, to train on both"
            )
    return datasets


def _check_number_of_classes(cfg: CfgNode, dataset: AnySet) -> None:
    key, classes = _classes_option(cfg)
    if classes and len(dataset.class_names) > classes:
        raise UserError(
            f"{key} {classes} contradicts data set {dataset.name}, which has {len(dataset.class_names)} categories; "
            "raise it, or set it to 0 to take the data set's number"
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
