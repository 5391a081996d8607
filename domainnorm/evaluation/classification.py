"""Predictions of a classifier, and their accuracy."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn
from tqdm import tqdm

from ..data import train_loader
from ..data.sampler import images_per_forward
from ..distributed import gather_objects, rank, world_size
from ..modeling.classifier import Classifier
from ..statistics.choose import set_statistics


@torch.no_grad()
def predict_classes(model: nn.Module, loader: Any, device: torch.device) -> list[dict[str, Any]]:
    """What `model`, in the mode it is in, makes of the images of every rank's `loader`; the same list on every rank.

    Args:
        loader: of `(images, targets)`, of `ClassificationDataset`.

    Returns:
        For each image (each time it comes), sorted by id, `image_id`, `file_name`, its `label`, the five likeliest
        `predicted` labels (or as many as there are) and the cross-entropy, `loss`.
    """
    found: list[dict[str, Any]] = []
    for images, targets in tqdm(loader, desc="evaluation", file=sys.stdout, disable=True if rank() else None):
        logits = model([image.to(device, non_blocking=True) for image in images]).float().cpu()
        labels = torch.stack([target["labels"] for target in targets])
        best = logits.topk(min(5, logits.shape[1])).indices.tolist()
        losses = F.cross_entropy(logits, labels, reduction="none").tolist()
        for target, predicted, loss in zip(targets, best, losses, strict=True):
            found.append(
                {
                    "image_id": target["image_id"],
                    "file_name": target["file_name"],
                    "label": int(target["labels"]),
                    "predicted": predicted,
                    "loss": loss,
                }
            )
    everything = [result for part in gather_objects(found) for result in part]
    return sorted(everything, key=lambda result: (result["image_id"], result["loss"]))


@contextmanager
def whole_minibatches(model: nn.Module) -> Iterator[None]:
    """Within it, classifiers in `model` normalize each batch that they are given as one minibatch."""
    classifiers = [module for module in model.modules() if isinstance(module, Classifier)]
    before = [module.minibatch_size for module in classifiers]
    try:
        for module in classifiers:
            module.minibatch_size = sys.maxsize
        yield
    finally:
        for module, size in zip(classifiers, before, strict=True):
            module.minibatch_size = size


def training_predictions(
    cfg: CfgNode, model: nn.Module, device: torch.device, train_data: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """What `model` in training mode makes of `TEST.TRAINING_IMAGES` images as it is trained on them.

    Normalized, augmented and with what else training does (*Rethinking "Batch"*, Figs. 3-5; *Batch Renormalization*,
    §4.3). The buffers of the model move: the caller puts them back.
    """
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    images = world_size() * images_per_forward(cfg, world_size())
    solver.IMS_PER_BATCH, solver.ACCUMULATE, solver.VIRTUAL_BATCH = images, 1, 0
    number = -(-cfg.TEST.TRAINING_IMAGES // images)
    set_statistics(model.train(), "auto").training = False  # of the whole: it predicts
    loader = train_loader(cfg, rank=rank(), world_size=world_size(), datasets=train_data)
    with closing(loader) as batches, whole_minibatches(model):
        return predict_classes(model, itertools.islice(batches, number), device)


def accuracy(predictions: list[dict[str, Any]], class_names: Sequence[str]) -> dict[str, float]:
    """`top1` and `top5` in percent, the mean cross-entropy `loss` in nats; and `top1-NAME` of each class, or nan."""
    count = len(predictions)
    labels = np.array([p["label"] for p in predictions])
    right = np.array([p["predicted"][0] for p in predictions]) == labels
    number = np.bincount(labels, minlength=len(class_names))
    of_class = np.bincount(labels[right], minlength=len(class_names)) / np.where(number, number, np.nan)
    return {
        "top1": 100 * sum(p["predicted"][0] == p["label"] for p in predictions) / count,
        "top5": 100 * sum(p["label"] in p["predicted"] for p in predictions) / count,
        "loss": sum(p["loss"] for p in predictions) / count,
        **{f"top1-{name}": 100 * float(value) for name, value in zip(class_names, of_class, strict=True)},
    }
