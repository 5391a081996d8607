"""Predictions of a classifier, and their accuracy."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..distributed import gather_objects, rank


@torch.no_grad()
def predict_classes(model: nn.Module, loader: Any, device: torch.device) -> list[dict[str, Any]]:
    """What `model`, in the mode it is in, makes of the images of every rank's `loader`; the same list on every rank.

    Args:
        loader: of `(images, targets)`, of `ClassificationDataset`.

    Returns:
        For each image, sorted by id, `image_id`, `file_name`, its `label`, the five likeliest `predicted` labels (or
        as many as there are) and the cross-entropy, `loss`.
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
    return sorted(everything, key=lambda result: result["image_id"])


def accuracy(predictions: list[dict[str, Any]]) -> dict[str, float]:
    """`top1` and `top5` in percent, and the mean cross-entropy `loss` in nats."""
    count = len(predictions)
    return {
        "top1": 100 * sum(p["predicted"][0] == p["label"] for p in predictions) / count,
        "top5": 100 * sum(p["label"] in p["predicted"] for p in predictions) / count,
        "loss": sum(p["loss"] for p in predictions) / count,
    }
