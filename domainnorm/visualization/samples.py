"""Pictures of what data sets say, and of what a model is trained on."""

import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..data import ClassificationDataset, CocoDataset, domain_names, train_loader, training_sets
from ..data.annotations import listed
from ..data.sampler import images_per_forward
from .draw import draw_objects
from .sheet import Group, as_uint8, enlarged

SMALLEST, LARGEST = 300, 560  # pixels of a picture's sides, where its image has fewer, or more


def annotated(cfg: CfgNode, number: int) -> list[Group]:
    """What the files of `DATASETS.TRAIN` and `TEST` say, of `number` images of each that are drawn by `SEED`.

    Every object of a file is shown, also those that training leaves out, whose name says so.
    """
    groups = []
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        if cfg.MODEL.META_ARCHITECTURE == "Classifier":
            classified = ClassificationDataset(name, max_intensity=cfg.INPUT.MAX_INTENSITY)
            samples = [
                _classified(*classified[index], classified.class_names) for index in _drawn(cfg, classified, number)
            ]
            classes = classified.class_names
            title = f"{name}: {len(classified)} images of {len(classes)} classes"
        else:
            dataset = CocoDataset(
                name, invalid_boxes="skip", masks=cfg.MODEL.MASK_ON, max_intensity=cfg.INPUT.MAX_INTENSITY
            )
            samples = [_as_in_file(dataset, index) for index in _drawn(cfg, dataset, number)]
            title = f"{name}: {_contents(dataset)}"
        groups.append(Group(f"{title}; {len(samples)} are drawn", *zip(*samples, strict=True)))
    return groups


def _contents(dataset: CocoDataset) -> str:
    """`350 images, 6369 objects of 3 classes: 5748 RBC, 366 WBC, 255 Platelets`, and what is unusual."""
    records, names = dataset.records, dataset.class_names
    of_classes = _counted([names[label] for label in records.labels.tolist()], most=20)
    objects = f"{len(records.labels)} objects of {len(names)} classes: {of_classes}"
    return "; ".join([f"{len(dataset)} images, {objects}", *filter(None, [listed(records.counts)])])


def loaded(cfg: CfgNode, number: int) -> list[Group]:
    """The first batches of training, of one process, until `number` images are shown: after all transforms."""
    datasets = training_sets(cfg)
    classes = datasets[0].class_names
    size = images_per_forward(cfg, 1)
    groups: list[Group] = []
    with closing(train_loader(cfg, rank=0, world_size=1, datasets=datasets)) as batches:
        while number > 0:
            images, targets = next(batches)
            shown = [
                _from_loader(cfg, image, target, classes, virtual=k % size >= size - cfg.SOLVER.VIRTUAL_BATCH)
                for k, (image, target) in enumerate(itertools.islice(zip(images, targets, strict=True), number))
            ]
            groups.append(Group(f"iteration {len(groups) + 1}", *zip(*shown, strict=True)))
            number -= len(shown)
    return groups


def _drawn(cfg: CfgNode, dataset: Any, number: int) -> list[int]:
    order = np.random.default_rng(cfg.SEED).permutation(len(dataset))
    return sorted(order[:number].tolist())


def _as_in_file(dataset: CocoDataset, index: int) -> tuple[Tensor, str]:
    image, target = dataset[index]
    records, columns = dataset.records, dataset.records.columns
    rows = np.flatnonzero(columns.images == records.images[index])
    names = []
    for row in rows.tolist():
        why = " (crowd)" if columns.crowds[row] else "" if records.kept[row] else " (invalid)"
        names.append(dataset.class_names[columns.labels[row]] + why)
    masks = None
    if dataset.masks and columns.segmentations is not None:
        size = image.shape[-2:]
        nothing = np.zeros(size, dtype=np.uint8)
        decoded = [
            nothing if row in records.unusable else columns.segmentations.mask(row, size) for row in rows.tolist()
        ]
        masks = torch.from_numpy(np.stack(decoded)).bool() if decoded else torch.zeros(0, *size, dtype=torch.bool)
    boxes = torch.from_numpy(records.boxes[rows])
    lines = [target["file_name"], _size(image), _counted(names)]
    if target["domain"]:
        lines.append(f"domain {target['domain']}")
    return _picture(image, boxes, names, masks, dataset.class_names), "\n".join(lines)


def _from_loader(
    cfg: CfgNode, image: Tensor, target: dict[str, Any], classes: Sequence[str], virtual: bool
) -> tuple[Tensor, str]:
    lines = ["a virtual image"] if virtual else []
    if "domain" in target and isinstance(target["domain"], Tensor):
        lines.append(f"domain {domain_names(cfg)[int(target['domain'])]}")
    if "boxes" not in target:
        picture, caption = _classified(image, target, classes)
        return picture, "\n".join([caption, *lines])
    names = [classes[label] for label in target["labels"].tolist()]
    masks = target["masks"].bool() if "masks" in target else None
    lines = [target["file_name"], _size(image), _counted(names), *lines]
    return _picture(image, target["boxes"], names, masks, classes), "\n".join(lines)


def _classified(image: Tensor, target: dict[str, Any], classes: Sequence[str]) -> tuple[Tensor, str]:
    picture, _ = enlarged(as_uint8(image), SMALLEST // 2, SMALLEST)
    return picture, f"{classes[int(target['labels'])]}\n{target['file_name']}\n{_size(image)}"


def _picture(
    image: Tensor, boxes: Tensor, names: Sequence[str], masks: Tensor | None, classes: Sequence[str]
) -> Tensor:
    """Scaled before it is drawn on, so that lines and letters are as large in all pictures."""
    picture, factor = enlarged(as_uint8(image), SMALLEST, LARGEST)
    if masks is not None:
        masks = F.resize(masks, list(picture.shape[-2:]), InterpolationMode.NEAREST)
    return draw_objects(picture, boxes * factor, names, masks=masks, classes=classes)


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]} pixels"


def _counted(names: Sequence[str], most: int = 5) -> str:
    """`3 disk, 1 ring`."""
    counts = Counter(names).most_common()
    rest = sum(count for _, count in counts[most:])
    return (
        ", ".join([f"{count} {name}" for name, count in counts[:most]] + [f"{rest} others"] * (rest > 0)) or "no object"
    )
