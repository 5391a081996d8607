"""Predictions of a model in COCO's format, and their AP by pycocotools."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_convert
from tqdm import tqdm

from ..data.annotations import clip_boxes
from ..data.masks import decode_segmentation, segmentation_problem
from ..distributed import gather_objects, rank
from ..errors import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


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
        UserError: "segm", and the predictions have no masks, or an object of the ground truth has none, or one that
            cannot be decoded.
    """
    if iou_type == "segm" and any("segmentation" not in prediction for prediction in predictions):
        raise UserError("the model predicts no masks: set MODEL.MASK_ON False to evaluate its boxes")
    truth = _index(_with_defaults(ground_truth, iou_type))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        if predictions:
            # loadRes writes into the entries; and it would take the area of a mask from a box beside it
            own = [{k: v for k, v in p.items() if iou_type == "bbox" or k != "bbox"} for p in predictions]
            results = truth.loadRes(own)
        else:
            results = _index(truth.dataset | {"annotations": []})
        evaluation = COCOeval(truth, results, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: float(value) * 100 if value >= 0 else float("nan")  # pycocotools' -1: nothing to find
        for name, value in zip(METRICS, evaluation.stats[: len(METRICS)], strict=True)
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


def _with_defaults(data: dict[str, Any], iou_type: str) -> dict[str, Any]:
    """With what pycocotools needs of each object but hand-made files leave out, and for "segm" masks as RLE."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]} if iou_type == "segm" else {}
    annotations = []
    for number, entry in enumerate(data["annotations"], start=1):
        if iou_type == "segm":
            rle = _rle(entry, sizes[entry["image_id"]])
            own = {"area": float(coco_mask.area(rle))} | entry | {"segmentation": rle}
        else:
            own = {"area": entry["bbox"][2] * entry["bbox"][3]} | entry
        # pycocotools takes an object with id 0 for one that was never matched
        annotations.append({"iscrowd": 0} | own | {"id": number})
    return data | {"annotations": annotations}


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
            decode_segmentation(segmentation, size)  # pycocotools compares RLEs of different lengths for ever
            return segmentation
        except (ValueError, TypeError) as error:
            problem = f"cannot be decoded ({error})"
    if problem:
        raise UserError(
            f"annotation {entry['id']} of the ground truth (image {entry['image_id']}): its segmentation {problem}; "
            "correct it, or set MODEL.MASK_ON False to evaluate boxes only"
        )
    rles = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.merge(rles) if isinstance(segmentation, list) else rles


def _index(data: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
