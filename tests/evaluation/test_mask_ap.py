"""Masks from the model to mask AP."""

import contextlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from triangles import HEIGHT, SQUARES, WIDTH, Oracle, config, rle, triangle, write

from domainnorm.config import UserError
from domainnorm.data import test_loader as make_test_loader
from domainnorm.engine.log import TrainingLog
from domainnorm.evaluation import evaluate, evaluate_coco, predict
from domainnorm.evaluation.tables import format_table

CPU = torch.device("cpu")


@pytest.fixture
def name(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture
def truth(name):
    return json.loads(Path(name.rsplit(":", 1)[0]).read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prediction_decodes_to_the_mask_from_one_half_on(name, tmp_path, dtype):
    painted = []

    def paint(masks):
        painted.extend(torch.randint(0, 5, masks.shape).to(dtype) / 4)
        return torch.stack(painted[-len(masks) :]) if len(masks) else masks

    loader = make_test_loader(config(name, tmp_path), name, rank=0, world_size=1)
    predictions = predict(Oracle(paint), loader, CPU)
    assert json.loads(json.dumps(predictions)) == predictions and len(predictions) == len(painted) == 3
    for prediction, mask in zip(predictions, painted, strict=True):
        assert np.array_equal(coco_mask.decode(prediction["segmentation"]), mask[0] >= 0.5)
        assert prediction.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}


def scores_of(name, folder, paint):
    return evaluate(config(name, folder, DATASETS__TEST=[name]), Oracle(paint))["population"]


@pytest.mark.parametrize(
    ("paint", "low", "high"),
    [
        (lambda m: m, 99.99, 100.01),
        (lambda m: m.flip(-1), 0, 40),
        (lambda m: m * 0, 0, 0),
        (lambda m: m * 0 + 1, 0, 40),
    ],
    ids=["perfect", "mirrored", "empty", "everywhere"],
)
def test_box_and_mask_ap(name, tmp_path, paint, low, high):
    scores = scores_of(name, tmp_path, paint)
    assert scores["bbox"]["AP"] == pytest.approx(100) and low <= scores["segm"]["AP"] <= high
    assert json.loads((tmp_path / "results.json").read_text())["population"].keys() == {"bbox", "segm"}


def test_boxes_alone_are_evaluated_as_ever(name, tmp_path):
    results = evaluate(tiny.config(name, tmp_path, DATASETS__TEST=[name]), Oracle())
    assert list(results["population"]) == ["bbox"]


def test_sizes_are_of_the_masks(name, truth, tmp_path):
    """A square of 40 x 40 is medium, and its half small."""
    scores = scores_of(name, tmp_path, lambda masks: masks)
    assert scores["segm"]["APs"] == pytest.approx(100) and np.isnan(scores["segm"]["APm"])
    assert (scores["bbox"]["APs"], scores["bbox"]["APm"]) == pytest.approx((100, 100))
    # A false positive counts among the objects of its own mask's size: this one's box is medium.
    full = [{"image_id": 12, "category_id": 3, "bbox": entry["bbox"], "score": 0.9} for entry in truth["annotations"]]
    for entry, prediction in zip(truth["annotations"], full, strict=True):
        prediction |= {"image_id": entry["image_id"], "segmentation": entry["segmentation"]}
    wrong = {"image_id": 11, "category_id": 3, "bbox": [20, 8, 40, 40], "score": 1.0}
    small = evaluate_coco([*full, wrong | {"segmentation": rle(triangle(20, 8, 40))}], truth, "segm")
    medium = evaluate_coco([*full, wrong | {"segmentation": rle(np.ones((HEIGHT, WIDTH)))}], truth, "segm")
    assert small["APs"] < 90 and medium["APs"] == pytest.approx(100)


def test_equals_pycocotools(tmp_path, truth):
    draw = random.Random(0)
    predictions = []
    for entry in truth["annotations"]:
        entry |= {"id": entry["id"] + 1, "iscrowd": 0, "area": float(coco_mask.area(entry["segmentation"]))}
        for _ in range(6):
            x, y, side, _ = (v + draw.randrange(3) for v in entry["bbox"])
            mask = {"image_id": entry["image_id"], "segmentation": rle(triangle(x, y, min(side, HEIGHT - y)))}
            predictions.append(mask | {"category_id": 3, "score": draw.random()})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    before = json.dumps([predictions, truth])
    scores = evaluate_coco([p | {"bbox": [0, 0, 1, 1]} for p in predictions], truth, "segm")
    assert json.dumps([predictions, truth]) == before
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        reference = COCOeval(coco, coco.loadRes(predictions), "segm")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert 0 < scores["AP"] < 100
    assert list(scores.values())[:4] == [100 * value for value in reference.stats[:4]]


def test_every_kind_of_segmentation_is_ground_truth(truth):
    x, y, side = SQUARES[2][0]
    square = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    square[y : y + side, x : x + side] = 1
    changes = np.flatnonzero(np.diff(square.ravel(order="F").astype(int), prepend=0)).tolist()
    polygon = [[x, y, x + side, y, x + side, y + side, x, y + side]]
    uncompressed = {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, square.size]).tolist()}
    prediction = {"image_id": 12, "category_id": 3, "score": 1.0, "segmentation": rle(square)}
    for segmentation in (polygon, uncompressed, rle(square)):
        one = truth | {"annotations": [truth["annotations"][-1] | {"segmentation": segmentation}]}
        assert evaluate_coco([prediction], one, "segm")["APm"] == pytest.approx(100)  # its area is 40 x 40


def test_a_crowd_without_a_mask_excuses_what_is_in_its_box(truth):
    """As one whose mask is the box does; without the crowd, they are false positives."""
    box = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    box[5:45, 10:] = 1
    crowd = {"id": 9, "image_id": 11, "category_id": 3, "bbox": [10, 5, 999, 40], "iscrowd": 1}
    found = [{"image_id": 11, "category_id": 3, "score": 1.0, "segmentation": rle(triangle(20, 8, 30))}] * 4
    for entry in truth["annotations"]:
        kept = {key: entry[key] for key in ("image_id", "category_id", "segmentation")}
        found.append(kept | {"score": 0.5})
    with_box, with_mask = (
        evaluate_coco(found, truth | {"annotations": [*truth["annotations"], crowd | extra]}, "segm")
        for extra in ({}, {"segmentation": rle(box)})
    )
    assert with_box["AP"] == with_mask["AP"] == pytest.approx(100)
    assert evaluate_coco(found, truth, "segm")["AP"] < 60


@pytest.mark.parametrize("broken", [None, [], {"size": [HEIGHT, WIDTH], "counts": "0"}])
def test_ground_truth_that_cannot_be_decoded(truth, broken):
    """Not a KeyError and, for an RLE that is too short, not a comparison that never ends."""
    truth["annotations"][1]["segmentation"] = broken
    prediction = {"image_id": 10, "category_id": 3, "score": 1.0, "segmentation": rle(triangle(*SQUARES[0][1]))}
    with pytest.raises(UserError, match=r"^annotation 1 of the ground truth \(image 10\): its segmentation"):
        evaluate_coco([prediction], truth, "segm")


# what is shown


def test_a_model_without_masks(truth):
    boxes = [{"image_id": 10, "category_id": 3, "bbox": [2, 4, 16, 16], "score": 1.0}]
    with pytest.raises(UserError, match=r"predicts no masks: set MODEL\.MASK_ON False"):
        evaluate_coco(boxes, truth, "segm")


def test_table():
    values = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 12.5)
    cells = "   12.50" * 6
    heads = "      AP    AP50    AP75     APs     APm     APl"
    assert format_table({"population": {"a": {"bbox": values}}}) == f"statistics{heads}\npopulation{cells}"
    both = {"bbox": values, "segm": values}
    assert format_table({"population": {"a": both}}).splitlines() == [
        *(f"statistics     {heads}", f"population bbox{cells}", f"population segm{cells}")
    ]
    assert format_table({"population": {"a": both, "b": both}}).splitlines()[1:] == [
        f"population {data_set} {kind}{cells}" for data_set in "ab" for kind in ("bbox", "segm")
    ]


def test_the_log_of_a_run_has_both(tmp_path, caplog):
    log = TrainingLog(tmp_path, 0, 10, CPU)
    with caplog.at_level("INFO"):
        log.evaluation(5, {"population": {"bbox": {"AP": 12.0, "AP50": 30.0}, "segm": {"AP": 9.5, "AP50": 20.0}}})
    log.close()
    assert caplog.messages == ["iteration 5/10  population/bbox/AP 12.00  population/segm/AP 9.50"]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["population/segm/AP50"] == 20 and written["population/bbox/AP"] == 12
