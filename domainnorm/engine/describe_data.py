"""What a run is trained and tested on, in numbers, for its log: what is wrong with a data set often shows there."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ..data.annotations import listed
from ..data.catalog import split_name
from ..data.classes import kind
from ..data.statistics import SetStatistics, statistics_of, training_size
from ..modeling import anchors
from ..modeling.mask_rcnn import GeneralizedRCNN
from ..modeling.retinanet import RetinaNet

logger = logging.getLogger(__name__)

MAX_CLASSES = 20  # in the table; of more, the most frequent and the rarest
_LONGEST = 36  # letters of a name
_FEW = 0.2  # share of objects without a fitting anchor from which on it is told what to change


@dataclass(frozen=True)
class DataReport:
    """What `describe_data` found.

    Attributes:
        text: a table of several lines.
        warnings: of one line each.
        training: of each training set.
        best_ious: of all objects of the training sets with an anchor, (n,); None without anchors.
        anchors: width and height of all of a place, (a, 2).
    """

    text: str
    warnings: list[str]
    training: list[SetStatistics]
    best_ious: Tensor | None
    anchors: Tensor | None


def describe_data(cfg: CfgNode, model: nn.Module, datasets: Sequence[Any], tests: Sequence[Any]) -> DataReport:
    """Images, objects, sizes of boxes against the anchors, and classes of the data sets of a run.

    Args:
        datasets: those of training, opened.
        tests: those of `DATASETS.TEST`, opened.
    """
    size, test_size = training_size(cfg), (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    training = [statistics_of(dataset, *size) for dataset in datasets]
    tested = [statistics_of(dataset, *test_size) for dataset in tests]
    ious = [_best_ious(model, own) for own in (*training, *tested)]
    rows = [_row(own, found) for own, found in zip((*training, *tested), ious, strict=True)]
    epochs = _epochs(cfg, training)
    for row, number in zip(rows, epochs, strict=False):
        row |= {"epochs": f"{number:.3g}"}
    for row, dataset in zip(rows[len(training) :], tests, strict=True):
        shared = sum(kind(cfg).shared_images(dataset, name) for name in cfg.DATASETS.TRAIN)
        row |= {"in training, too": str(shared)}
    lines = ["data sets", *table(rows)]
    boxes = any(len(own.boxes) for own in training)
    if boxes:
        lines.append(
            "(√area of boxes in pixels, which 5 %, 50 % and 95 % of them are below, and their best IoU with an anchor: "
            f"where the shorter side of training images is {size[0]}, of test images {test_size[0]})"
        )
    for own in (*training, *tested):
        if any(own.counts.values()):
            lines.append(f"{_short(own.name)}: {listed(own.counts)}")
    lines += _classes(training, tested)
    of_training = [found for found in ious[: len(training)] if found is not None]
    best, shapes = (torch.cat(of_training), _shapes(model)) if of_training else (None, None)
    return DataReport("\n".join(lines), _warnings(cfg, training, best, shapes), training, best, shapes)


def draw_data(report: DataReport, folder: Path) -> None:
    """`labels.png` in `folder`, where there is matplotlib."""
    try:
        from ..visualization.labels import draw_labels
    except ImportError:
        logger.info("labels.png is not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    draw_labels(folder / "labels.png", report.training, report.best_ious, report.anchors)


def _row(own: SetStatistics, ious: Tensor | None) -> dict[str, str]:
    row = {"set": _short(own.name), "images": str(own.images)}
    if not len(own.objects):
        return row
    row |= {"objects": str(int(own.objects.sum())), "crowds": str(own.crowds)}
    row |= {"of an image": f"{own.objects.mean():.1f}", "without": str(int((own.objects == 0).sum()))}
    if len(own.boxes):
        roots = np.sqrt((own.boxes[:, 2:] - own.boxes[:, :2]).prod(1))
        row |= {"√area": " ".join(f"{value:.0f}" for value in np.quantile(roots, (0.05, 0.5, 0.95)))}
    if ious is not None:
        row |= {f"IoU < {limit}": f"{100 * (ious < limit).float().mean():.1f} %" for limit in (0.5, 0.4)}
    return row


def _short(entry: str) -> str:
    """The name of a data set or, of two paths without one, its annotation file; of a long one its end."""
    name = split_name(entry)[0]
    file, _, folder = name.rpartition(":")
    shown = file if file and folder else name
    return shown if len(shown) <= _LONGEST else f"…{shown[1 - _LONGEST :]}"


def table(rows: Sequence[Mapping[str, str]], *, left: bool = False) -> list[str]:
    """Lines, of which the first names the columns; the first column, or all with `left`, is aligned to the left."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([row.get(name, "-") for name in names] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    return [
        "  ".join(
            cell.ljust(width) if left or not k else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _epochs(cfg: CfgNode, training: Sequence[SetStatistics]) -> list[float]:
    """How often each image of each training set comes in the whole run."""
    drawn = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    shares = np.array(cfg.DATALOADER.RATIOS or [own.images for own in training], dtype=np.float64)
    return [drawn * share / own.images for share, own in zip(shares / shares.sum(), training, strict=True)]


def _classes(training: Sequence[SetStatistics], tested: Sequence[SetStatistics]) -> list[str]:
    """Objects (of a classifier, images) of each class, the most frequent first."""
    names = next((own.class_names for own in (*training, *tested) if own.class_names), [])
    counts, others = (
        sum((own.class_counts for own in sets if len(own.class_counts) == len(names)), np.zeros(len(names), dtype=int))
        for sets in (training, tested)
    )
    order = np.argsort(-counts, kind="stable").tolist()
    half = MAX_CLASSES // 2
    shown = order if len(order) <= MAX_CLASSES else [*order[:half], *order[-half:]]
    rows = [
        {
            "class": names[label],
            "training": str(counts[label]),
            "share": f"{100 * counts[label] / max(counts.sum(), 1):.1f} %",
            "test": str(others[label]),
        }
        for label in shown
    ]
    if not rows:
        return []
    lines = table(rows)
    if len(shown) < len(order):
        lines.insert(half + 1, f"… {len(order) - len(shown)} classes between")
    return lines


def _warnings(cfg: CfgNode, training: Sequence[SetStatistics], ious: Tensor | None, shapes: Tensor | None) -> list[str]:
    found = []
    for own in training:
        if own.absent:
            more = f" and {len(own.absent) - 5} more" if len(own.absent) > 5 else ""
            found.append(f"{_short(own.name)}: nothing of the classes {', '.join(own.absent[:5])}{more}")
    if ious is None or shapes is None or (share := float((ious < 0.5).float().mean())) <= _FEW:
        return found
    sides = [(own.boxes[:, 2:] - own.boxes[:, :2]).prod(1) for own in training]
    low, high = np.quantile(np.sqrt(np.concatenate(sides)), (0.05, 0.95))
    roots = shapes.prod(1).sqrt()
    found.append(
        f"{100 * share:.0f} % of the objects have no anchor of an IoU of 0.5: 90 % of the boxes are {low:.0f} to "
        f"{high:.0f} pixels large (√area), the anchors {roots.min():.0f} to {roots.max():.0f}; change "
        f"MODEL.ANCHOR_GENERATOR.SIZES {list(cfg.MODEL.ANCHOR_GENERATOR.SIZES)} or ASPECT_RATIOS, or "
        f"INPUT.MIN_SIZE_TRAIN {list(cfg.INPUT.MIN_SIZE_TRAIN)}"
    )
    return found


def _generator(model: nn.Module) -> tuple[Any, int]:
    """The anchors of our detectors and the stride of the finest level; None for other models."""
    if isinstance(model, RetinaNet):
        return model.anchor_generator, 8
    if isinstance(model, GeneralizedRCNN):
        return model.rpn.anchor_generator, 4
    return None, 0


def _best_ious(model: nn.Module, own: SetStatistics) -> Tensor | None:
    generator, finest = _generator(model)
    if generator is None or not len(own.boxes):
        return None
    strides = [finest * 2**level for level in range(len(generator.cell_anchors))]
    return anchors.best_ious(torch.from_numpy(own.boxes), torch.from_numpy(own.sizes), generator, strides)


def _shapes(model: nn.Module) -> Tensor:
    cells = torch.cat([cell.cpu() for cell in _generator(model)[0].cell_anchors])
    return cells[:, 2:] - cells[:, :2]
