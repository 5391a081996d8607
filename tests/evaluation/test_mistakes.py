"""Matched predictions, curves, thresholds and the confusion matrix: by hand, and against AP50 and faster-coco-eval."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from faster_coco_eval import COCO
from faster_coco_eval.extra import PreviewResults
from test_ap_equals_pycocotools import CATEGORY_IDS, draw_data

from domainnorm.evaluation import evaluate_coco
from domainnorm.evaluation.mistakes import find_mistakes

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]  # sorted by id they are cat, dog


def thing(image, kind, x, score=None, **others):
    name = {"cat": 3, "dog": 7}[kind]
    entry = {"image_id": image, "category_id": name, "bbox": [x, 0, 10, 10], **others}
    return entry if score is None else entry | {"score": score}


def truth_of(objects):
    images = [{"id": id_, "width": 200, "height": 100} for id_ in (1, 2, 3)]
    return {"images": images, "annotations": [o | {"id": k} for k, o in enumerate(objects)], "categories": CATEGORIES}


@pytest.fixture
def mistakes():
    objects = [
        *(thing(1, "cat", 0), thing(1, "dog", 20), thing(1, "cat", 90), thing(2, "dog", 0), thing(2, "dog", 50)),
        thing(3, "dog", 100, iscrowd=1),
    ]
    predictions = [
        thing(1, "cat", 0, 0.9),  # right
        thing(1, "cat", 20, 0.8),  # a dog
        thing(1, "dog", 21, 0.75),  # right, but the object is taken for the cat where classes do not matter
        thing(1, "cat", 140, 0.1),  # nothing, under the threshold
        thing(2, "dog", 0, 0.7),  # right
        thing(2, "dog", 1, 0.6),  # twice
        thing(3, "dog", 101, 0.95),  # in a crowd: no mistake, and nothing found
    ]
    return find_mistakes(predictions, truth_of(objects))


def test_curves_by_hand(mistakes):
    cat, dog = mistakes.curves
    assert mistakes.class_names == ["cat", "dog"] and (cat.objects, dog.objects) == (2, 3)
    assert (
        cat.scores.tolist() == [0.9, 0.8, 0.1] and cat.right.tolist() == [1, 1, 1] and cat.wrong.tolist() == [0, 1, 2]
    )
    assert cat.precision.tolist() == [1, 1 / 2, 1 / 3] and cat.recall.tolist() == [1 / 2, 1 / 2, 1 / 2]
    assert (
        dog.scores.tolist() == [0.75, 0.7, 0.6] and dog.right.tolist() == [1, 2, 2] and dog.wrong.tolist() == [0, 0, 1]
    )
    assert mistakes.overall.scores.tolist() == [0.9, 0.8, 0.75, 0.7, 0.6, 0.1]
    assert mistakes.overall.right.tolist() == [1, 1, 2, 3, 3, 3] and mistakes.overall.objects == 5


def test_the_threshold_of_the_largest_f1(mistakes):
    cat, dog = mistakes.curves
    assert (cat.threshold, dog.threshold, mistakes.threshold) == (0.9, 0.7, 0.7)
    for curve in (cat, dog, mistakes.overall):
        f1 = []
        for precision, recall in zip(curve.precision, curve.recall, strict=True):
            f1.append(2 * precision * recall / (precision + recall))
        np.testing.assert_allclose(curve.f1, f1, rtol=1e-12)
        assert curve.scores[int(np.argmax(f1))] == curve.threshold


def test_the_confusion_matrix_by_hand(mistakes):
    """At 0.7: one cat right and one missed; one dog taken for a cat (the better dog comes second), one right."""
    assert mistakes.confusion.tolist() == [[1, 0, 1], [1, 1, 1], [0, 1, 0]]


def test_mistakes_by_image(mistakes):
    assert mistakes.missed == {1: 1, 2: 1}  # the cat at 90, the dog at 50
    assert mistakes.wrong == {1: 1}  # the cat at 20
    assert mistakes.worst(5) == [1, 2] and mistakes.worst(1) == [1]


def test_predictions_of_equal_scores_are_kept_together():
    objects = [thing(1, "cat", 0), thing(1, "cat", 50)]
    found = [thing(1, "cat", 0, 0.5), thing(1, "cat", 100, 0.5), thing(1, "cat", 50, 0.5), thing(1, "cat", 150, 0.2)]
    (cat, dog) = find_mistakes(found, truth_of(objects)).curves
    assert cat.scores.tolist() == [0.5, 0.2] and cat.right.tolist() == [2, 2] and cat.wrong.tolist() == [1, 2]
    assert cat.threshold == 0.5 and math.isnan(dog.threshold) and dog.objects == len(dog.scores) == 0


def test_nothing_right_or_nothing_at_all():
    objects = [thing(1, "cat", 0)]
    for predictions in ([], [thing(1, "cat", 50, 0.9), thing(2, "dog", 0, 0.4)]):
        found = find_mistakes(predictions, truth_of(objects))
        assert math.isnan(found.overall.threshold) and found.threshold == 0.5
        assert found.missed == {1: 1} and found.wrong == ({1: 1} if predictions else {})
        assert found.confusion.tolist() == [[0, 0, 1], [0, 0, 0], [int(bool(predictions)), 0, 0]]
        assert found.curves[0].interpolated().tolist() == [0.0] * 101
    assert find_mistakes([], truth_of([])).confusion.sum() == 0


@pytest.mark.parametrize(("seed", "kind"), itertools.product(range(0, 60, 3), ["bbox", "segm"]))
def test_curves_have_the_ap50_of_coco_and_the_confusion_of_faster_coco_eval(seed, kind):
    """On random data; the reference of the matrix knows no crowds."""
    draw = random.Random(seed)
    predictions, truth = draw_data(draw)
    for entry in truth["annotations"]:
        entry["iscrowd"] = int(entry["iscrowd"] and seed % 2)
        entry["area"] = min(entry["area"], 1e9)  # beyond COCO's largest it would not count
    for prediction in predictions:
        prediction["score"] = draw.random()  # no ties: their order matters to AP
    found = find_mistakes(predictions, truth, kind)
    scores = evaluate_coco(predictions, truth, kind)
    curves = [curve for curve in found.curves if curve.objects]
    in_one = Counter((p["image_id"], p["category_id"]) for p in predictions)
    if curves and max(in_one.values(), default=0) <= 100:
        ap50 = 100 * np.mean([curve.interpolated() for curve in curves])
        assert ap50 == pytest.approx(scores["AP50"], abs=1e-9)
    if seed % 2 or not truth["annotations"]:
        return
    shape = {"bbox": "bbox", "segm": "segmentation"}[kind]
    kept = [
        {"id": k, "area": 1, **{key: p[key] for key in ("image_id", "category_id", "score", shape)}}
        for k, p in enumerate(predictions, start=1)
        if p["score"] >= found.threshold and p["category_id"] in CATEGORY_IDS
    ]
    both = COCO(truth), COCO(truth | {"annotations": kept})
    reference = PreviewResults(*both, iouType=kind, iou_tresh=0.5).compute_confusion_matrix()
    order = np.argsort(CATEGORY_IDS)  # theirs is in the order of the file
    np.testing.assert_array_equal(found.confusion[:-1, :-1], reference[order][:, order])
    np.testing.assert_array_equal(found.confusion[-1, :-1], reference[order, -2])
    np.testing.assert_array_equal(found.confusion[:-1, -1], reference[order, -1])
