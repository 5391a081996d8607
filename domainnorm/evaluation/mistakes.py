"""Which predictions are right at an IoU of 0.5: curves, best thresholds, confusion matrix, mistakes by image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.columns import columns_of
from .coco import by_category, category_names
from .precision import coco_evaluation

IOU = 0.5
UNSURE = 0.5  # the threshold where no prediction is right, and none can be chosen
_RECALLS = np.linspace(0, 1, 101)  # of COCO's AP


@dataclass(frozen=True)
class Curve:
    """Precision and recall of the predictions that score at least so much.

    Attributes:
        scores: each score once, from the highest on, (m,).
        right, wrong: how many predictions score at least as much, int64 (m,).
        objects: how many there are to find.
    """

    scores: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: int

    @property
    def precision(self) -> np.ndarray:
        """(m,)."""
        return self.right / (self.right + self.wrong)

    @property
    def recall(self) -> np.ndarray:
        """(m,); nan where there is nothing to find."""
        return self.right / self.objects if self.objects else np.full(len(self.right), np.nan)

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of precision and recall, (m,)."""
        return 2 * self.right / (self.right + self.wrong + self.objects)

    @property
    def best(self) -> int | None:
        """The position of the largest F1, at the highest score that has it; None if no prediction is right."""
        return int(self.f1.argmax()) if len(self.scores) and self.right[-1] else None

    @property
    def threshold(self) -> float:
        """The score from which on to keep predictions for the largest F1; nan if none is right."""
        return float("nan") if self.best is None else float(self.scores[self.best])

    def interpolated(self) -> np.ndarray:
        """The highest precision at each of COCO's 101 recalls or beyond, 0 where it is not reached; AP50 is the mean.

        But for the order of predictions of equal scores, which AP counts one by one.
        """
        highest = np.maximum.accumulate(self.precision[::-1])[::-1]
        positions = np.searchsorted(self.recall, _RECALLS)
        return np.append(highest, 0.0)[positions]


@dataclass(frozen=True)
class Mistakes:
    """What is right and wrong of a detector's predictions.

    Attributes:
        class_names: of the categories, sorted by id.
        curves: of each class.
        overall: of all predictions, whatever their class, so that all have one threshold.
        threshold: the score from which on predictions count below: `overall.threshold`, or 0.5 if none is right.
        confusion: int64 (k + 1, k + 1): objects of class i (a row) that were taken for class j; the last column are
            those that were missed, the last row predictions of nothing, or of an object that another one has found.
        missed, wrong: how many objects of each image were not found as what they are, and how many predictions are not
            right (so an object found as another class is in both), by image id, of images with either.
    """

    class_names: list[str]
    curves: list[Curve]
    overall: Curve
    threshold: float
    confusion: np.ndarray
    missed: dict[int, int]
    wrong: dict[int, int]

    def worst(self, count: int) -> list[int]:
        """The ids of the images with the most mistakes, missed objects and wrong predictions together."""
        total = {id_: self.missed.get(id_, 0) + self.wrong.get(id_, 0) for id_ in {*self.missed, *self.wrong}}
        return sorted(total, key=lambda id_: (-total[id_], id_))[:count]


def find_mistakes(
    predictions: Sequence[dict[str, Any]], ground_truth: dict[str, Any], iou_type: str = "bbox"
) -> Mistakes:
    """Match predictions and objects as COCO's AP does at an IoU of 0.5, each class alone; for the confusion matrix
    together. A prediction within a crowd counts neither way.

    Args:
        predictions, ground_truth, iou_type: as of `evaluate_coco`.

    Raises:
        UserError: as `evaluate_coco`.
    """
    columns = columns_of(ground_truth, "the ground truth", masks=iou_type == "segm")
    images, objects, found = by_category(columns, predictions, iou_type)
    missed: dict[int, int] = {}
    wrong: dict[int, int] = {}
    matched = []
    for category in columns.categories:
        own, of_category = objects.get(category["id"], []), found.get(category["id"], [])
        matched.append((own, of_category, _matches(images, own, of_category, iou_type)))
    curves = [_curve(*each) for each in matched]
    overall = _curve(*_joined(matched))
    threshold = UNSURE if overall.best is None else overall.threshold
    for own, of_category, partners in matched:
        hits: set[int] = set()
        for prediction, partner in zip(of_category, partners, strict=True):
            if prediction["score"] >= threshold and partner < 0:
                wrong[prediction["image_id"]] = wrong.get(prediction["image_id"], 0) + 1
            elif prediction["score"] >= threshold:
                hits.add(partner)
        for row, entry in enumerate(own):
            if not entry["iscrowd"] and row not in hits:
                missed[entry["image_id"]] = missed.get(entry["image_id"], 0) + 1
    category_ids = [category["id"] for category in columns.categories]
    everything = sorted(
        (entry for id_ in category_ids for entry in objects.get(id_, [])), key=lambda entry: entry["id"]
    )
    kept = [entry for id_ in category_ids for entry in found.get(id_, []) if entry["score"] >= threshold]
    return Mistakes(
        class_names=category_names(columns),
        curves=curves,
        overall=overall,
        threshold=threshold,
        confusion=_confusion(category_ids, everything, kept, _matches(images, everything, kept, iou_type, one=True)),
        missed=missed,
        wrong=wrong,
    )


_Matched = tuple[list[dict[str, Any]], list[dict[str, Any]], np.ndarray]  # objects, predictions, position of the object


def _matches(
    images: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    predictions: list[dict[str, Any]],
    iou_type: str,
    *,
    one: bool = False,
) -> np.ndarray:
    """The position in `objects` of what each prediction is of, or -1, int64. `one`: as if all were of one class."""
    partners = np.full(len(predictions), -1)
    if not objects or not predictions:
        return partners
    rows = [entry | {"id": row} for row, entry in enumerate(objects, start=1)]
    evaluation = coco_evaluation(images, rows, predictions, iou_type)
    params = evaluation.params
    params.iouThrs, params.maxDets, params.areaRng, params.areaRngLbl = [IOU], [len(predictions)], [[0, 1e10]], ["all"]
    params.useCats = int(not one)
    evaluation.evaluate()
    for pair in evaluation.eval["matched"]:
        prediction, row = map(int, pair.split("_"))
        partners[prediction - 1] = row - 1
    return partners


def _joined(matched: Sequence[_Matched]) -> _Matched:
    objects: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    partners = []
    for own, found, positions in matched:
        partners.append(np.where(positions < 0, -1, positions + len(objects)))
        objects.extend(own)
        predictions.extend(found)
    return objects, predictions, np.concatenate(partners)


def _curve(objects: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]], partners: np.ndarray) -> Curve:
    crowds = np.array([bool(entry["iscrowd"]) for entry in objects] + [False])  # the last one for -1
    counted = ~crowds[partners]
    scores = np.array([entry["score"] for entry in predictions], dtype=float)[counted]
    right = (partners >= 0)[counted]
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # of those with one score
    return Curve(scores[last], np.cumsum(right)[last], np.cumsum(~right)[last], int((~crowds[:-1]).sum()))


def _confusion(
    category_ids: list[int], objects: list[dict[str, Any]], predictions: list[dict[str, Any]], partners: np.ndarray
) -> np.ndarray:
    place = {id_: k for k, id_ in enumerate(category_ids)}
    nothing = len(category_ids)
    confusion = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    found = set(partners.tolist())
    for row, entry in enumerate(objects):
        if row not in found and not entry["iscrowd"]:
            confusion[place[entry["category_id"]], nothing] += 1
    for entry, partner in zip(predictions, partners.tolist(), strict=True):
        if partner < 0:
            confusion[nothing, place[entry["category_id"]]] += 1
        elif not objects[partner]["iscrowd"]:
            confusion[place[objects[partner]["category_id"]], place[entry["category_id"]]] += 1
    return confusion
