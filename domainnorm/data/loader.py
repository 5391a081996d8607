"""Batches for training and evaluation, on this rank."""

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from ..distributed import rank, this_rank, timeout
from ..distributed.watch import VARIABLE
from ..errors import UserError
from .classes import AnySet, kind, label_other_set, label_training_sets
from .classification_sets import minibatch_size, minibatches
from .domains import WithDomain, domain_of, training_domains
from .sampler import evaluation_indices, images_per_forward
from .set_sampler import SetBatchSampler
from .workers import num_workers

logger = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()  # of which test and training sets it was told whether they share images

Sample = tuple[torch.Tensor, dict[str, Any]]
Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]


def training_sets(cfg: CfgNode, transforms: Callable[..., Any] | None = None) -> list[AnySet]:
    """The data sets of `DATASETS.TRAIN`, opened and checked, with the labels of the model.

    Args:
        transforms: of image and target (of a classifier, of the image alone); None: those of the config.

    Raises:
        UserError: what is wrong with the config or the annotations.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError(f"DATASETS.TRAIN is empty; name a data set, such as {kind(cfg).EXAMPLES}")
    datasets: list[AnySet] = [kind(cfg).training_set(cfg, name) for name in cfg.DATASETS.TRAIN]
    label_training_sets(cfg, datasets)
    for dataset in datasets if transforms is not None else ():
        dataset.transforms = transforms
    return datasets


def train_loader(
    cfg: CfgNode,
    *,
    rank: int,
    world_size: int,
    start_iteration: int = 0,
    datasets: Sequence[Any] | None = None,
) -> Generator[Batch, None, None]:
    """The infinite batches of this rank: `(images, targets)`, lists of `IMS_PER_BATCH // world_size` and, in each
    of its `ACCUMULATE` parts, `VIRTUAL_BATCH` more.

    Images are float32 (3, H, W) in [0, 1], a detector's of different sizes; targets are those of `CocoDataset`, with
    masks if `MODEL.MASK_ON`, or of `ClassificationDataset`, as plain tensors; with `DATASETS.DOMAINS` they have
    `domain`, int64 (), the position in `domain_names(cfg)`. Which image comes when, and how it is augmented, depends on
    `SEED` and the position only: not on the number of workers, nor on whether the run began at `start_iteration` or
    came there. Closing the generator ends the workers.

    Args:
        datasets: what is loaded, with its transforms; None: `training_sets(cfg)`.

    Raises:
        UserError: here, for the config and the annotations; from the iterator, for an image.
    """
    _check_share(cfg, world_size)
    datasets = training_sets(cfg) if datasets is None else datasets
    place = {"rank": rank, "world_size": world_size, "start": start_iteration}
    composed = cfg.DATALOADER.RATIOS or cfg.DATALOADER.COMPOSITION != "mixed"
    sampler = _by_ratios(cfg, datasets, **place) if composed else kind(cfg).batch_sampler(cfg, datasets, **place)
    return _training_batches(cfg, datasets, training_domains(cfg), sampler)


def one_set_loader(cfg: CfgNode, name: str, *, rank: int, world_size: int) -> Generator[Batch, None, None]:
    """Batches as `train_loader`'s, of data set `name` instead of the training sets: without ratios and composition.

    With `DATASETS.DOMAINS` its domain is the one that it is trained or tested as, else -1.

    Raises:
        UserError: as `train_loader`; the data set's classes do not fit those of training.
    """
    _check_share(cfg, world_size)
    dataset = kind(cfg).training_set(cfg, name)
    label_other_set(cfg, dataset, "TEST.RECOMPUTE.DATASET")
    sampler = kind(cfg).batch_sampler(cfg, [dataset], rank=rank, world_size=world_size, start=0)
    return _training_batches(cfg, [dataset], [domain_of(cfg, name)], sampler)


def _check_share(cfg: CfgNode, world_size: int) -> None:
    total, ways = cfg.SOLVER.IMS_PER_BATCH, world_size * cfg.SOLVER.ACCUMULATE
    if total % ways:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {total} cannot be shared equally by {world_size} processes with "
            f"SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE}; use a multiple of {ways}"
        )


def _by_ratios(cfg: CfgNode, datasets: Sequence[Any], **place: int) -> SetBatchSampler:
    return SetBatchSampler(
        [kind(cfg).wide_images(cfg, dataset) for dataset in datasets],
        images_per_forward(cfg, place["world_size"]),
        ratios=cfg.DATALOADER.RATIOS or [len(dataset) for dataset in datasets],
        domains=training_domains(cfg),
        composition=cfg.DATALOADER.COMPOSITION,
        parts=cfg.SOLVER.ACCUMULATE,
        seed=cfg.SEED,
        **place,
    )


def _training_batches(
    cfg: CfgNode, datasets: Sequence[Any], domains: list[int], sampler: Sampler[list[tuple[int, int]]]
) -> Generator[Batch, None, None]:
    samples: list[Any] = list(datasets)
    if cfg.DATASETS.DOMAINS:
        samples = [WithDomain(dataset, domain) for dataset, domain in zip(datasets, domains, strict=True)]
    return _batches(_loader(_Seeded(ConcatDataset(samples)), sampler, num_workers(cfg)))


class EvaluationLoader:
    """This rank's part of a data set; iterating gives batches as `train_loader`'s.

    Attributes:
        dataset: the whole `CocoDataset` or `ClassificationDataset`.
        batches: the indices of the images in each batch; there may be none.
        domain: what its targets say; None: nothing.
    """

    def __init__(
        self, dataset: Any, batches: Sequence[Sequence[int]], num_workers: int, domain: int | None = None
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.num_workers = num_workers
        self.domain = domain

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        workers = min(self.num_workers, len(self.batches))
        samples = self.dataset if self.domain is None else WithDomain(self.dataset, self.domain)
        return _batches(_loader(_Caught(samples), self.batches, workers))


def test_loader(cfg: CfgNode, name: str, *, rank: int, world_size: int) -> EvaluationLoader:
    """The images of data set `name` that this rank evaluates, once and in order, `TEST.IMS_PER_BATCH` a batch.

    A detector's images are in their own size, a classifier's square. Targets have no masks: evaluation takes them from
    the annotation file. With `DATASETS.DOMAINS` they have `domain`, int64 (), -1 if it is unknown.

    Raises:
        UserError: here, for the annotations, also if `MODEL.MASK_ON` and they have no masks, and for classes that do
            not fit those of training; when iterated, for an image.
    """
    dataset = kind(cfg).evaluation_set(cfg, name)
    label_other_set(cfg, dataset, "DATASETS.TEST")
    _tell_shared_images(cfg, dataset)
    indices, size = evaluation_indices(len(dataset), rank, world_size), cfg.TEST.IMS_PER_BATCH
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    domain = domain_of(cfg, name) if cfg.DATASETS.DOMAINS else None
    return EvaluationLoader(dataset, batches, num_workers(cfg), domain)


def _tell_shared_images(cfg: CfgNode, dataset: AnySet) -> None:
    """Once in a process: a score on images that the model is trained on is another thing than one on new images."""
    for name in cfg.DATASETS.TRAIN:
        if rank() == 0 and (dataset.name, name) not in _told:
            _told.add((dataset.name, name))
            if shared := kind(cfg).shared_images(dataset, name):
                logger.warning(
                    "%s: %d of its %d images are also in the training set %s", dataset.name, shared, len(dataset), name
                )


def minibatch_loader(cfg: CfgNode, loader: EvaluationLoader, *, rank: int, world_size: int) -> EvaluationLoader:
    """This rank's minibatches of a classifier's data set, for predictions under minibatch statistics.

    See `classification_sets.minibatches`. All ranks together have the same ones, however many they are.
    """
    batches = minibatches(cfg, loader.dataset.labels.numpy(), minibatch_size(cfg, world_size))
    own = [batches[i] for i in evaluation_indices(len(batches), rank, world_size)]
    return EvaluationLoader(loader.dataset, own, loader.num_workers, loader.domain)


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
        while True:
            with _answering(getattr(iterator, "_workers", [])):
                batch = next(iterator, None)
            if isinstance(batch, UserError):
                raise batch
            if batch is None:
                return
            yield batch
    finally:
        workers = getattr(iterator, "_workers", [])
        del iterator  # its last reference, even while a traceback holds this frame: the workers end here
        for worker in workers:
            worker.kill()  # but for one that hangs


@contextmanager
def _answering(workers: Sequence[Any]) -> Iterator[None]:
    """Ends the processes that load data where they take too long: the one that stopped may hold a lock of the others.

    (The loader's own `timeout` does not help where it waits for a process to hand over a batch that is ready.)
    """
    seconds, late = timeout(), threading.Event()

    def end() -> None:
        late.set()
        for worker in workers:
            worker.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if workers:
        timer.start()
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if not late.is_set():
            raise
        for worker in workers:
            with suppress(RuntimeError):  # torch raises that one has died when the signal comes: let it come here
                worker.join()
        gave = f"gave nothing for {seconds:g} s ({VARIABLE})"
        raise UserError(f"{this_rank(rank())}: the processes that load its data {gave}") from error
    finally:
        timer.cancel()


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
