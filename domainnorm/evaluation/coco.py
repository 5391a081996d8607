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

from ..data.boxes import clip_boxes
from ..data.columns import Columns, columns_of
from ..data.masks import rle_of_polygons
from ..distributed import gather_objects, rank
from ..errors import UserError, quote
from .precision import AR_DETECTIONS, MAX_DETECTIONS, SHAPES, area_of, precision_and_recall


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
        if not isinstance(outputs, (list, tuple)) or [*map(_is_detection, outputs)] != [True] * len(images):
            raise UserError(
                f"the {type(model).__name__} returned {quote(outputs)} for {len(images)} images in eval mode: expected "
                "a list with a dict of boxes (XYXY), labels and scores, tensors of one row an object, for each"
            )
        for output, target in zip(outputs, targets, strict=True):
            found += coco_results(int(target["image_id"]), output, loader.dataset.category_ids)
    everything = [result for part in gather_objects(found) for result in part]
    return sorted(everything, key=lambda result: result["image_id"])  # stable


def _is_detection(output: Any) -> bool:
    needed = [output.get(key) for key in ("boxes", "labels", "scores")] if isinstance(output, dict) else [None]
    return all(isinstance(value, torch.Tensor) for value in needed)


def evaluate_coco(
    predictions: list[dict[str, Any]],
    ground_truth: dict[str, Any],
    iou_type: str = "bbox",
    *,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, float]:
    """AP and AR of `predictions` (in COCO's results format) against all of `ground_truth`, in percent.

    Args:
        ground_truth: the contents of a COCO annotation file, as `CocoDataset.ground_truth` returns them. Fields are
            checked as those of a file are.
        iou_type: "bbox" or "segm", of boxes or masks.
        max_detections: how many of each category count in an image, the best ones. COCO's definition has 100, and fewer
            are never taken: what finds all of 200 objects would not have an AP of 100.

    Returns:
        COCO's twelve numbers: AP (mean over IoU 0.5 to 0.95), AP50, AP75, and APs, APm, APl, of small, medium and large
        objects; AR1, AR10 and AR100, the recall of as many detections of a category in an image (mean over the same
        IoU), and ARs, ARm, ARl, of as many as AP counts. Then of each category AP-NAME and AR-NAME, of as many. nan
        where the ground truth has no such object.

    Raises:
        UserError: a field of the ground truth is not what COCO has there; predictions of an image that it does not
            have; "segm", and the predictions have no masks, or an object of the ground truth has none, or one that
            cannot be decoded.
    """
    if iou_type == "segm" and any("segmentation" not in prediction for prediction in predictions):
        raise UserError("the model predicts no masks: set MODEL.MASK_ON False to evaluate its boxes")
    columns = columns_of(ground_truth, "the ground truth", masks=iou_type == "segm")
    images, objects, found = by_category(columns, predictions, iou_type)
    count = max(max_detections, MAX_DETECTIONS)
    number = len(columns.categories)
    precision, recall = np.full((10, 101, number, 4), -1.0), np.full((10, number, 4, 1 + len(AR_DETECTIONS)), -1.0)
    for k, category in enumerate(columns.categories):  # one at a time, they need a fraction of the memory
        if own := objects.get(category["id"]):
            precision[:, :, k], recall[:, k] = precision_and_recall(
                images, own, found.get(category["id"], []), iou_type, count
            )
    scores = {
        "AP": _average(precision[..., 0]),
        "AP50": _average(precision[0, ..., 0]),
        "AP75": _average(precision[5, ..., 0]),
        **{f"AP{size}": _average(precision[..., k]) for k, size in enumerate("sml", start=1)},
        **{f"AR{most}": _average(recall[..., 0, k]) for k, most in enumerate(AR_DETECTIONS)},
        **{f"AR{size}": _average(recall[..., k, -1]) for k, size in enumerate("sml", start=1)},
    }
    for k, name in enumerate(category_names(columns)):
        scores |= {f"AP-{name}": _average(precision[:, :, k, 0]), f"AR-{name}": _average(recall[:, k, 0, -1])}
    return scores


def by_category(
    columns: Columns, predictions: Iterable[dict[str, Any]], iou_type: str
) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]], dict[int, list[dict[str, Any]]]]:
    """The images of a ground truth, and its objects and the predictions by the id of their category.

    Raises:
        UserError: as `evaluate_coco`.
    """
    unknown = {prediction["image_id"] for prediction in predictions} - set(columns.image_ids.tolist())
    if unknown:
        raise UserError(f"there are predictions of image {min(unknown)}, which the ground truth does not have")
    images = [
        {"id": id_, "height": height, "width": width}
        for id_, (height, width) in zip(columns.image_ids.tolist(), columns.sizes.tolist(), strict=True)
    ]
    return images, _by_category(_objects(columns, iou_type)), _by_category(predictions)


def category_names(columns: Columns) -> list[str]:
    """The name of each category, with its id where another one has the same name."""
    names = [category["name"] for category in columns.categories]
    return [
        name if names.count(name) == 1 else f"{name} ({category['id']})"
        for name, category in zip(names, columns.categories, strict=True)
    ]


def coco_results(image_id: int, output: dict[str, Tensor], category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """The detections in one image in COCO's results format.

    Args:
        output: `boxes` (n, 4), XYXY, `labels` and `scores` (n,) and, of a model with masks, `masks` (n, 1, H, W), of
            which 0.5 or more is the object.
        category_ids: of each label; None: its detections are left out.

    Raises:
        UserError: a label that has none.
    """
    labels = output["labels"].tolist()
    if max(labels, default=0) >= len(category_ids):
        raise UserError(
            f"the model predicts class {max(labels)}, counted from 0, but the data set has {len(category_ids)} "
            "categories: name the data set the model was trained for in DATASETS.TEST; of a model of your own whose "
            "labels begin with 1, MODEL.CLASS_NAMES begins with 'background', and DATASETS.LABELS is union"
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


def _objects(columns: Columns, iou_type: str) -> Iterator[dict[str, Any]]:
    """What is evaluated of each object, with what hand-made files leave out, and for "segm" masks as RLE."""
    if not np.isfinite(columns.xywh).all():
        row = int(np.flatnonzero(~np.isfinite(columns.xywh).all(axis=1))[0])
        raise UserError(
            f"annotation {columns.ids[row]} of the ground truth: its box is {columns.xywh[row].tolist()}; expected "
            "finite numbers: correct it, or take CocoDataset.ground_truth(), which leaves out what is not used"
        )
    shapes: Sequence[Any] = columns.xywh.tolist() if iou_type == "bbox" else _rles(columns)
    image_ids, category_ids = columns.image_ids.tolist(), [category["id"] for category in columns.categories]
    areas = zip(columns.areas.tolist(), np.isnan(columns.areas).tolist(), shapes, strict=True)
    for row, (area, unknown, shape) in enumerate(areas):
        yield {
            "id": row + 1,  # from 1: an object with id 0 would be taken for one that was never matched
            "image_id": image_ids[columns.images[row]],
            "category_id": category_ids[columns.labels[row]],
            "iscrowd": int(columns.crowds[row]),
            "area": area_of(shape) if unknown else area,
            SHAPES[iou_type]: shape,
        }


def _rles(columns: Columns) -> list[dict[str, Any]]:
    """The masks of the ground truth. A crowd without one has its box: files may leave it out there."""
    assert columns.segmentations is not None
    problems = columns.segmentations.unusable(columns.sizes[columns.images])
    for row, problem in sorted(problems.items()):
        if not columns.crowds[row]:
            image = columns.image_ids[columns.images[row]]
            raise UserError(
                f"annotation {columns.ids[row]} of the ground truth (image {image}): its segmentation {problem}; "
                "correct it, or set MODEL.MASK_ON False to evaluate boxes only"
            )
    sizes = [columns.size(image) for image in columns.images.tolist()]
    return [
        _rle_of_box(columns.xywh[row], size) if row in problems else columns.segmentations.rle(row, size)
        for row, size in enumerate(sizes)
    ]


def _rle_of_box(xywh: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    boxes, _, _ = clip_boxes(xywh[None], np.array([size]))
    x0, y0, x1, y1 = boxes[0].tolist()
    return rle_of_polygons([[x0, y0, x1, y0, x1, y1, x0, y1]], size)


def _by_category(entries: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["category_id"], []).append(entry)
    return found


def _average(values: np.ndarray) -> float:
    """In percent, over what there is to find; nan if there is nothing."""
    found = values[values > -1]
    return float(found.mean()) * 100 if len(found) else float("nan")
