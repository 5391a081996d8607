"""Precision and recall of the predictions of one category, by faster-coco-eval, to the last bit as by pycocotools."""

import logging
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask

MAX_DETECTIONS = 100  # in an image, by COCO's definition of AP
AR_DETECTIONS = (1, 10, 100)  # in an image, of AR1, AR10 and AR100
SHAPES = {"bbox": "bbox", "segm": "segmentation"}  # of each kind of IoU the key of what overlaps

logger = logging.getLogger(__name__)


def precision_and_recall(
    images: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    predictions: list[dict[str, Any]],
    iou_type: str,
    max_detections: int = MAX_DETECTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """What AP and AR are the means of; no category depends on another's.

    Args:
        images: of all categories, in COCO's format.
        objects: with "id" (not 0), "iscrowd" and "area", and masks as RLE. They get more keys.
        predictions: in COCO's results format.

    Returns:
        The precision at (10 IoU thresholds, 101 recalls, 4 ranges of area: all, small, medium and large), of the
        `max_detections` best predictions in each image; and the recall at (10 IoU thresholds, 4 ranges of area, 4 such
        numbers: 1, 10, 100 and `max_detections`). -1 where there is nothing to find.
    """
    evaluation = coco_evaluation(images, objects, predictions, iou_type)
    counts = sorted({*AR_DETECTIONS, max_detections})
    evaluation.params.maxDets = counts
    ranges = evaluation.params.areaRng
    sizes = [sum(not one["iscrowd"] and low <= one["area"] <= high for one in objects) for low, high in ranges]
    evaluation.params.recThrs = np.append(evaluation.params.recThrs, [2 / max(size, 1) for size in sizes])
    evaluation.evaluate()
    evaluation.accumulate()
    curves = evaluation.eval["precision"][:, :, 0, :, -1]
    # pycocotools divides by the number of predictions plus 2**-52, which makes a difference to 1 / 1 only: to a
    # precision of 1 that is less when two objects are found. For these there is a recall more for each range of area.
    curves, of_two = curves[:, : -len(ranges)], curves[:, -len(ranges) :].diagonal(axis1=1, axis2=2)
    precision = np.where((curves == 1) & (of_two < 1)[:, None], 1 / (1 + 2**-52), curves)
    recall = evaluation.eval["recall"][:, 0]
    return precision, recall[..., [counts.index(count) for count in (*AR_DETECTIONS, max_detections)]]


def coco_evaluation(
    images: list[dict[str, Any]], objects: list[dict[str, Any]], predictions: list[dict[str, Any]], iou_type: str
) -> COCOeval_faster:
    """An evaluation that has yet to run, of all categories in it. Prediction i has id i + 1."""
    shape = SHAPES[iou_type]
    kept = ("image_id", "category_id", "score", shape)
    results = [
        {key: prediction[key] for key in kept} | {"id": number, "area": area_of(prediction[shape])}
        for number, prediction in enumerate(predictions, start=1)
    ]
    used = {entry["image_id"] for entry in (*objects, *results)}
    shared = {
        "images": [image for image in images if image["id"] in used],
        "categories": [{"id": id_} for id_ in sorted({entry["category_id"] for entry in (*objects, *results)})],
    }
    truth, found = (COCO(shared | {"annotations": entries}) for entries in (objects, results))
    # One worker: more cost more than they gain, an image has few masks of a category.
    return COCOeval_faster(truth, found, iou_type, print_function=logger.debug, rle_iou_max_workers=1)


def area_of(shape: Any) -> float:
    """The area in pixels of a box (x, y, width, height) or an RLE."""
    return float(coco_mask.area(shape)) if isinstance(shape, dict) else shape[2] * shape[3]
