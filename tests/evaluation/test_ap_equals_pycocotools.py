"""AP and AR of random data sets, of each category too, are to the last bit what plain use of pycocotools finds."""

import contextlib
import copy
import io
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from domainnorm.config import UserError
from domainnorm.evaluation import evaluate_coco

SIZE = 128
CATEGORY_IDS = [3, 1, 90]  # there are predictions of 7, too, which the data set has not


def draw_entry(draw, image_ids, category_ids, boxes):
    """An object or a prediction, often where an earlier one is or nearly so, of any range of area."""
    box = [draw.randrange(8), 4, *draw.choices((9, 40, 110), k=2)]
    if boxes and draw.random() < 0.7:
        box = [max(1, value + draw.choice((0, 0, 1, -1, 2.5))) for value in draw.choice(boxes)]
    boxes.append(box)
    x, y, w, h = box
    corners = [x, y, x, y + h, x + w, y + h, x + w, y]
    polygon = corners if draw.random() < 0.8 else corners[:6]
    return {
        "image_id": draw.choice(image_ids),
        "category_id": draw.choice(category_ids),
        "bbox": box,
        "segmentation": [polygon],
    }


def with_rle(entry):
    rle = coco_mask.frPyObjects(entry["segmentation"], SIZE, SIZE)[0]
    return entry | {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}


def draw_data(draw):
    """Predictions and ground truth, with crowds, ties, and images and categories without one or the other."""
    image_ids = draw.sample(range(1000), draw.randint(1, 6))
    boxes = []
    annotations = []
    for number in range(1, draw.choice((0, 1, 2, 8, 25)) + 1):
        entry = draw_entry(draw, image_ids, draw.choice((CATEGORY_IDS, CATEGORY_IDS[:1])), boxes)
        area = draw.choice((entry["bbox"][2] * entry["bbox"][3], draw.choice((0, 32**2, 96**2, 2e10))))
        entry |= {"id": number, "area": area, "iscrowd": int(draw.random() < 0.2)}
        annotations.append(with_rle(entry) if draw.random() < 0.7 else entry)
    predictions = [
        with_rle(draw_entry(draw, image_ids, draw.choice(([*CATEGORY_IDS, 7], CATEGORY_IDS[:1])), boxes))
        | {"score": draw.choice((draw.random(), draw.randrange(4) / 4))}
        for _ in range(draw.choice((0, 1, 2, 20, 60, 400)))  # of which 100 an image count
    ]
    images = [{"id": id_, "width": SIZE, "height": SIZE} for id_ in image_ids]
    categories = [{"id": id_, "name": str(id_)} for id_ in CATEGORY_IDS]
    return predictions, {"images": images, "annotations": annotations, "categories": categories}


def plain(predictions, truth, kind):
    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        if predictions:
            # a mask's area would be taken from a box beside it
            entries = [{k: v for k, v in p.items() if kind == "bbox" or k != "bbox"} for p in predictions]
            found = coco.loadRes(entries)
        else:  # which loadRes does not take
            found = COCO()
            found.dataset = coco.dataset | {"annotations": []}
            found.createIndex()
        evaluation = COCOeval(coco, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = evaluation.stats.tolist()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    for k in range(len(truth["categories"])):
        for own in (precision[:, :, k, 0, -1], recall[:, k, 0, -1]):
            found = own[own > -1]
            values.append(float(found.mean()) if len(found) else -1)
    return [100 * value if value > -1 else math.nan for value in values]


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(["bbox", "segm"]))
def test_equals_pycocotools(seed, kind):
    predictions, truth = draw_data(random.Random(seed))
    before = copy.deepcopy((predictions, truth))
    scores = evaluate_coco(predictions, truth, kind)
    assert (predictions, truth) == before
    np.testing.assert_array_equal(list(scores.values()), plain(predictions, truth, kind))


def test_a_large_data_set_equals_pycocotools():
    """With more objects than recalls, of which some are found with a precision of 1 and some never."""
    draw = random.Random(0)
    images = [{"id": id_, "width": SIZE, "height": SIZE} for id_ in range(60)]
    truth = {"images": images, "annotations": [], "categories": [{"id": id_, "name": "x"} for id_ in CATEGORY_IDS]}
    predictions = []
    for number in range(1, 701):
        entry = with_rle(draw_entry(draw, range(60), CATEGORY_IDS, []))
        truth["annotations"].append(entry | {"id": number, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0})
        for _ in range(draw.randrange(4)):
            near = draw_entry(draw, [entry["image_id"]], [entry["category_id"]], [entry["bbox"]])
            predictions.append(with_rle(near) | {"score": draw.random()})
    for kind in ("bbox", "segm"):
        scores = evaluate_coco(predictions, truth, kind)
        assert list(scores)[-6:] == [f"{metric}-x ({id_})" for id_ in sorted(CATEGORY_IDS) for metric in ("AP", "AR")]
        assert (
            1 < scores["AP"] < 99
            and scores["AR1"] < scores["AR10"] < scores["AR100"]
            and list(scores.values()) == plain(predictions, truth, kind)
        )


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ("KUP`0", "do not add up to 16384 pixels"),  # -5 and 16389
        ("PP`0P", "end within a number"),
    ],
)
def test_compressed_rle_of_other_runs_than_an_image_has(counts, problem):
    predictions, truth = draw_data(random.Random(12))
    assert truth["annotations"]
    truth["annotations"][0]["segmentation"] = {"size": [SIZE, SIZE], "counts": counts}
    with pytest.raises(UserError, match=rf"^annotation 1 .* cannot be decoded \(its RLE counts {problem}\)"):
        evaluate_coco(predictions, truth, "segm")


def test_predictions_of_other_images():
    _, truth = draw_data(random.Random(12))
    prediction = {"image_id": 1000, "category_id": 3, "bbox": [1, 1, 9, 9], "score": 1.0}
    with pytest.raises(UserError, match="predictions of image 1000, which the ground truth does not have"):
        evaluate_coco([prediction], truth)
