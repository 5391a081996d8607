"""Images of a data set with what a model predicted there."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_convert

from ..data import ClassificationDataset, CocoDataset
from ..visualization.pairs import Objects, side_by_side

Predictions = Sequence[dict[str, Any]]  # of a data set


def draw_some(dataset: CocoDataset | ClassificationDataset, predictions: Predictions, count: int) -> dict[str, Tensor]:
    """`count` images by their file names, evenly from the whole data set, so the same ones each time.

    A detector's have their objects on the left and, on the right, the predictions of the highest scores, as many as
    there are objects (one at least); a classifier's have the true and the predicted class.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist()
    if isinstance(dataset, ClassificationDataset):
        first = {entry["image_id"]: entry for entry in reversed(predictions)}
        return dict(_draw_class(dataset, first[index]) for index in indices if index in first)
    ids = {dataset.image_ids[index] for index in indices}
    found: dict[int, list[dict[str, Any]]] = {id_: [] for id_ in ids}
    for entry in predictions:
        if entry["image_id"] in ids:
            found[entry["image_id"]].append(entry)
    drawn = {}
    for index in indices:
        number = max(1, len(dataset.records[index].boxes))
        best = sorted(found[dataset.image_ids[index]], key=lambda entry: -entry["score"])[:number]
        drawn[dataset.records[index].file_name] = draw_detections(dataset, index, best)
    return drawn


def draw_detections(dataset: CocoDataset, index: int, predictions: Predictions) -> Tensor:
    """Image `index` with its objects on the left and `predictions` of it, in COCO's results format, on the right.

    Masks are drawn where the predictions have some. Crowds are not drawn.

    Returns:
        uint8 (3, H, W).
    """
    dataset = copy.copy(dataset)
    dataset.transforms = None
    dataset.masks = any("segmentation" in entry for entry in predictions) and (
        dataset.records.columns.segmentations is not None
    )
    image, target = dataset[index]
    names = dataset.class_names
    label = {id_: label for label, id_ in enumerate(dataset.category_ids)}
    boxes = torch.tensor([entry["bbox"] for entry in predictions], dtype=torch.float32).view(-1, 4)
    masks = [coco_mask.decode(entry["segmentation"]) for entry in predictions if "segmentation" in entry]
    return side_by_side(
        image.as_subclass(Tensor),
        Objects(
            target["boxes"].as_subclass(Tensor),
            [names[k] for k in target["labels"].tolist()],
            masks=target["masks"].as_subclass(Tensor).bool() if "masks" in target else None,
        ),
        Objects(
            box_convert(boxes, "xywh", "xyxy"),
            [names[label[entry["category_id"]]] for entry in predictions],
            scores=[entry["score"] for entry in predictions],
            masks=torch.from_numpy(np.stack(masks)).bool() if masks else None,
        ),
        names,
    )


def read_unchanged(dataset: ClassificationDataset, index: int) -> tuple[Tensor, str]:
    """Image `index`, uint8 (3, H, W), without crop, and its file name."""
    dataset = copy.copy(dataset)
    dataset.transforms = None
    image, target = dataset[index]
    return image.as_subclass(Tensor), target["file_name"]


def class_name(names: Sequence[str], label: int) -> str:
    """Also of a class that the model has and the data set has not."""
    return names[label] if label < len(names) else f"class {label}"


def _draw_class(dataset: ClassificationDataset, prediction: dict[str, Any]) -> tuple[str, Tensor]:
    image, file_name = read_unchanged(dataset, prediction["image_id"])
    height, width = image.shape[1:]
    border = torch.tensor([[0.0, 0.0, width - 1, height - 1]])
    true, predicted = (
        class_name(dataset.class_names, label) for label in (prediction["label"], prediction["predicted"][0])
    )
    return file_name, side_by_side(image, Objects(border, [true]), Objects(border, [predicted]), dataset.class_names)
