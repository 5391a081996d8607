"""Predictions of a model in COCO's format, and their AP."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.ops import box_convert
from tqdm import tqdm

from ..data.annotations import clip_boxes
from ..data.masks import check_compressed, segmentation_problem
from ..distributed import gather_objects, rank
from ..errors import UserError
from .precision import SHAPES, area_of, precision_of_category


@torch.no_grad()
def predict(model: nn.Module, loader: Any, device: torch.device) -> list[dict[str, Any]]:
    """What `model`, in the mode it is in, finds in the images of every rank's `loader`; the same list on every rank.

    Results are in COCO's format, with the RLE of each mask where the model has masks. Sorted by image id, then as the
    model gave it: batch sizes, order and ranks leave no trace.

    Args:
        loader: of `(images, targets)`, its `dataset.category_ids` the COCO id of each label, or None: predictions of it
            are left out.
    """
    found: list[dict[str, Any]] = []
    for images, targets in tqdm(loader, desc="evaluation", file=sys.stdout, disable=True if rank() else None):
        outputs = model([image.to(device, non_blocking=True) for image in images])
        for output, target in zip(outputs, targets, strict=True):
            found += _coco_results(int(target["image_id"]), output, loader.dataset.category_ids)
    everything = [result for part in gather_objects(found) for result in part]
    return sorted(everything, key=lambda result: result["image_id"])  # stable


def evaluate_coco(
    predictions: list[dict[str, Any]], ground_truth: dict[str, Any], iou_type: str = "bbox"
) -> dict[str, float]:
    """AP of `predictions` (in COCO's results format) against all of `ground_truth`, in percent.

    Args:
        ground_truth: the contents of a COCO annotation file, as `CocoDataset.ground_truth` returns them.
        iou_type: "bbox" or "segm", of boxes or masks.

    Returns:
        AP (mean over IoU 0.5 to 0.95), AP50, AP75, and AP of small, medium and large objects; nan where the ground
        truth has no such object.

    Raises:
        UserError: predictions of an image that the ground truth does not have; "segm", and the predictions have no
            masks, or an object of the ground truth has none, or one that cannot be decoded.
    """
    if iou_type == "segm" and any("segmentation" not in prediction for prediction in predictions):
        raise UserError("the model predicts no masks: set MODEL.MASK_ON False to evaluate its boxes")
    images = ground_truth["images"]
    unknown = {prediction["image_id"] for prediction in predictions} - {image["id"] for image in images}
    if unknown:
        raise UserError(f"there are predictions of image {min(unknown)}, which the ground truth does not have")
    objects, found = _by_category(_objects(ground_truth, iou_type)), _by_category(predictions)
    category_ids = sorted({category["id"] for category in ground_truth["categories"]})
    precision = np.full((10, 101, len(category_ids), 4), -1.0)
    for k, id_ in enumerate(category_ids):  # one at a time, they need a fraction of the memory
        if id_ in objects:
            precision[:, :, k] = precision_of_category(images, objects[id_], found.get(id_, []), iou_type)
    return {
        "AP": _average(precision[..., 0]),
        "AP50": _average(precision[0, ..., 0]),
        "AP75": _average(precision[5, ..., 0]),
        "APs": _average(precision[..., 1]),
        "APm": _average(precision[..., 2]),
        "APl": _average(precision[..., 3]),
    }


def _coco_results(image_id: int, output: dict[str, Tensor], category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    labels = output["labels"].tolist()
    if max(labels, default=0) >= len(category_ids):
        raise UserError(
            f"the model predicts class {max(labels)}, counted from 0, but the data set has {len(category_ids)} "
            "categories: name the data set the model was trained for in DATASETS.TEST"
        )
    if None in category_ids:
        kept = [row for row, label in enumerate(labels) if category_ids[label] is not None]
        output, labels = {key: value[kept] for key, value in output.items()}, [labels[row] for row in kept]
    boxes, scores = box_convert(output["boxes"].float(), "xyxy", "xywh").tolist(), output["scores"].tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in output:
        for result, mask in zip(results, output["masks"], strict=True):  # (1, H, W) each: not all at once on the CPU
            rle = coco_mask.encode(np.asfortranarray((mask[0] >= 0.5).cpu().numpy(), dtype=np.uint8))
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return results


def _objects(data: dict[str, Any], iou_type: str) -> Iterator[dict[str, Any]]:
    """What is evaluated of each object, with what hand-made files leave out, and for "segm" masks as RLE."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]} if iou_type == "segm" else {}
    for number, entry in enumerate(data["annotations"], start=1):
        shape = _rle(entry, sizes[entry["image_id"]]) if iou_type == "segm" else entry["bbox"]
        yield {
            "id": number,  # from 1: an object with id 0 would be taken for one that was never matched
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "iscrowd": entry.get("iscrowd", 0),
            "area": entry["area"] if "area" in entry else area_of(shape),
            SHAPES[iou_type]: shape,
        }


def _rle(entry: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The mask of an object of the ground truth. A crowd without one has its box: files may leave it out there."""
    segmentation = entry.get("segmentation")
    problem = segmentation_problem(segmentation, size)
    if problem and entry.get("iscrowd", 0):
        boxes, _, _ = clip_boxes(np.array([entry["bbox"]], dtype=np.float64), np.array([size]))
        x0, y0, x1, y1 = boxes[0].tolist()
        segmentation, problem = [[x0, y0, x1, y0, x1, y1, x0, y1]], ""
    if not problem and isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        try:
            check_compressed(segmentation["counts"], size)
            return segmentation
        except ValueError as error:
            problem = f"cannot be decoded ({error})"
    if problem:
        raise UserError(
            f"annotation {entry['id']} of the ground truth (image {entry['image_id']}): its segmentation {problem}; "
            "correct it, or set MODEL.MASK_ON False to evaluate boxes only"
        )
    rles = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.merge(rles) if isinstance(segmentation, list) else rles


def _by_category(entries: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["category_id"], []).append(entry)
    return found


def _average(precision: np.ndarray) -> float:
    """In percent, over what there is to find; nan if there is nothing."""
    found = precision[precision > -1]
    return float(found.mean()) * 100 if len(found) else float("nan")
