"""Annotation files, mutated: each is refused in one line, or trained on and evaluated as the same table."""

import copy
import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from domainnorm.config import UserError
from domainnorm.data import CocoDataset
from domainnorm.data.detection_sets import class_names
from domainnorm.evaluation import evaluate_coco

HEIGHT, WIDTH = 12, 16
SQUARE = [1, 1, 9, 1, 9, 8, 1, 8]
VALID = {
    "info": {"categories": [{"id": 1}]},
    "images": [
        {"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH, "domain": "day"},
        {"id": 3, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 1, 8, 7], "iscrowd": 0, "area": 40.5},
        {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0, 0, 16, 12], "iscrowd": 1, "area": 100},
        {"id": 4, "image_id": 3, "category_id": 5, "bbox": [2.5, 3, 4, 4.5]},
        {"id": 8, "image_id": 3, "category_id": 9, "bbox": [6, 2, 5, 9], "area": 20},
    ],
    "categories": [{"id": 9, "name": "cup"}, {"id": 5, "name": "dog"}],
}
RLE = coco_mask.encode(np.asfortranarray(np.tri(HEIGHT, WIDTH, dtype=np.uint8)))["counts"].decode()
SEGMENTATIONS = [
    [SQUARE],
    {"size": [HEIGHT, WIDTH], "counts": [20, 100, 72]},
    [[2.5, 3, 6.5, 3, 6.5, 7.5], SQUARE],
    {"size": [HEIGHT, WIDTH], "counts": RLE},
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**53, 2**63, 2**64, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1.0, 2.0, 5.0, 7.0, 0.5, 1e-9, 1e300, math.nan, math.inf, -math.inf]),
    st.sampled_from(
        ["", "a.png", "b.png", "../x", "/", "\0", "\ud800", "\n", "é", "5", "x" * 300, RLE, RLE[:-1], "ooo"]
    ),
    st.sampled_from([[], {}, [[]], [[1, 1, 2, 2]], [SQUARE], [1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]),
    st.sampled_from([[-1, 0, 9, 9], [3, 3, 0, 0], [2, 2, -1, 5], [90, 3, 4, 4], [1, 1, 1e308, 1e308]]),
    st.sampled_from([{"size": [HEIGHT, WIDTH], "counts": [192]}, {"size": [12.0, 16.0], "counts": "0"}]),
)


def containers(tree):
    """All lists and objects in `tree`."""
    if isinstance(tree, (dict, list)):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from containers(value)


@st.composite
def files(draw):
    """The bytes of an annotation file: a valid one with a few changes in its values, or in its text."""
    data = copy.deepcopy(VALID)
    for entry, segmentation in zip(data["annotations"], SEGMENTATIONS, strict=True):
        entry["segmentation"] = copy.deepcopy(segmentation)
    for _ in range(draw(st.integers(0, 3))):
        places = [container for container in containers(data) if len(container)]
        place = places[draw(st.integers(0, len(places) - 1))]
        key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else draw(st.integers(0, len(place) - 1))
        change = draw(st.sampled_from(["value", "value", "value", "remove", "repeat", "add"]))
        if change == "value":
            place[key] = copy.deepcopy(draw(VALUES))
        elif change == "remove":
            del place[key]
        elif isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        else:
            place[draw(st.sampled_from(["iscrowd", "area", "segmentation", "domain", "id"]))] = copy.deepcopy(
                draw(VALUES)
            )
    text = json.dumps(data, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"])), "surrogatepass")
    if draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(content) - 1))
        new = draw(st.sampled_from([b"", b"\xff", b'"', b"[", b"}", b",", b"1e999", b"NaN", b"[" * 2000, b"\0"]))
        content = content[:at] + new + content[at + draw(st.integers(0, 3)) :]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    return folder


def check(name, **options):
    """Whether the data set can be used; then training and evaluation agree on it."""
    try:
        dataset = CocoDataset(name, **options)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 1000
        return False
    assert class_names(name) == dataset.class_names
    truth = dataset.ground_truth()
    json.dumps([truth["images"], truth["annotations"]], allow_nan=False)
    crowds = [entry["id"] for entry in truth["annotations"] if entry.get("iscrowd")]
    trained = []
    predictions = []
    for index in range(len(dataset)):
        try:
            image, target = dataset[index]
        except UserError as error:
            assert "\n" not in str(error) and "annotations say" in str(error)  # of another size
            continue
        assert image.shape == (3, HEIGHT, WIDTH)
        boxes = target["boxes"]
        assert torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
        assert (boxes[:, 0::2] <= WIDTH).all() and (boxes[:, 1::2] <= HEIGHT).all()
        assert len(boxes) == len(target["labels"]) and set(target["labels"].tolist()) <= set(
            range(len(dataset.category_ids))
        )
        if "masks" in target:
            assert target["masks"].shape == (len(boxes), HEIGHT, WIDTH) and set(target["masks"].unique().tolist()) <= {
                0,
                1,
            }
    for record in dataset.records:
        trained += record.annotation_ids.tolist()
        for box, label, row in zip(record.boxes.tolist(), record.labels.tolist(), record.rows.tolist(), strict=True):
            x0, y0, x1, y1 = box
            found = {"image_id": record.image_id, "category_id": dataset.category_ids[label], "score": 0.9}
            found["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            if options.get("masks"):
                found["segmentation"] = dataset.records.columns.segmentations.rle(row, record.size)
            predictions.append(found)
    assert sorted(trained + crowds) == sorted(entry["id"] for entry in truth["annotations"])
    for kind in ("bbox", "segm")[: 1 + bool(options.get("masks"))]:
        scores = evaluate_coco(predictions, truth, kind)
        if kind == "bbox":
            assert math.isnan(scores["AP"]) or scores["AP"] > 0
    return True


@pytest.mark.slow
def test_every_file_is_refused_in_one_line_or_used_alike(folder):
    seen = {True: 0, False: 0}
    file = folder / "annotations.json"

    @settings(
        max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(files(), st.booleans(), st.sampled_from(["error", "skip"]), st.booleans())
    def fuzz(content, masks, invalid_boxes, keep_empty):
        file.write_bytes(content)
        before = time.monotonic()
        seen[check(f"{file}:{folder}", masks=masks, invalid_boxes=invalid_boxes, keep_empty=keep_empty)] += 1
        assert time.monotonic() - before < 5

    fuzz()
    assert sum(seen.values()) >= 2000 and min(seen.values()) > 300, seen
