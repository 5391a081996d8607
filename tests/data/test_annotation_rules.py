"""What was checked is what is used: each field by one rule in training and evaluation; what is left out is counted."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from domainnorm.config import UserError
from domainnorm.data import CocoDataset, train_loader
from domainnorm.data import test_loader as make_test_loader
from domainnorm.data.boxes import resized
from domainnorm.data.columns import Strings
from domainnorm.data.transforms import ShortestSize
from domainnorm.evaluation import evaluate_coco

SIZE = 64


@pytest.fixture
def make(tmp_path):
    """A data set of two images whose three objects have the given fields; its name."""

    def write(*fields, folder="a", **lists):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("0.png", "1.png"):
            Image.new("RGB", (SIZE, SIZE), (200, 90, 10)).save(tmp_path / folder / name)
        boxes = [[4, 4, 20, 20], [8, 30, 30, 20], [10, 10, 40, 40]]
        data = {
            "images": [{"id": k, "file_name": f"{k}.png", "height": SIZE, "width": SIZE} for k in (0, 1)],
            "annotations": [
                {
                    "id": 5 + k,
                    "image_id": k // 2,
                    "category_id": 3,
                    "bbox": box,
                    **(fields[k] if k < len(fields) else {}),
                }
                for k, box in enumerate(boxes)
            ],
            "categories": [{"id": 3, "name": "x"}],
        } | lists
        file = tmp_path / folder / "annotations.json"
        file.write_text(json.dumps(data))
        return f"{file}:{file.parent}"

    return write


def message_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raw(name):
    with open(name.rsplit(":", 1)[0]) as stream:
        return json.load(stream)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("area", value) for value in (None, "5", -1, float("nan"), float("inf"), True, [4], 10**400)),
        *(("iscrowd", value) for value in (None, "1", 2, -1, 0.5, float("nan"), [])),
        *(("image_id", value) for value in (None, True, "0", 0.5, 1e300, 10**30)),
        *(("category_id", value) for value in (False, 3.1)),
        ("id", True),
        *(("bbox", value) for value in ([1, 2, 3, True], [1, 2, 3, None], [1, 2, 3, 10**400], {"x": 1}, "1234")),
    ],
)
def test_a_wrong_field_is_refused_wherever_it_is_read(make, field, value):
    name = make({}, {field: value})
    message = message_of(CocoDataset, name)
    assert "annotations.json: annotations[1]" in message and f"has {field} " in message and "expected" in message
    assert field == "id" or "(id 6)" in message
    evaluated = message_of(evaluate_coco, [], raw(name))
    assert evaluated.partition(": ")[2] == message.partition(".json: ")[2]


@pytest.mark.parametrize(
    "fields",
    [
        {"id": 6.0, "image_id": 0.0, "category_id": 3.0},
        {"iscrowd": 1.0},
        {"iscrowd": True},
        {"iscrowd": 0.0, "area": 0},
        {"iscrowd": False, "area": 12},
    ],
)
def test_whole_floats_and_flags_are_taken_alike(make, fields):
    dataset = CocoDataset(make({}, fields))
    crowd = bool(fields.get("iscrowd"))
    assert [len(dataset[k][1]["boxes"]) for k in (0, 1)] == [2 - crowd, 1]
    truth = dataset.ground_truth()
    assert [entry["id"] for entry in truth["annotations"]] == [5, 6, 7]
    assert [entry.get("iscrowd", 0) for entry in truth["annotations"]] == [0, crowd, 0]
    assert all(type(entry[key]) is int for entry in truth["annotations"] for key in ("id", "image_id", "category_id"))
    found = [
        {"image_id": record.image_id, "category_id": 3, "bbox": [x, y, u - x, v - y], "score": 1.0}
        for record in dataset.records
        for x, y, u, v in record.boxes.tolist()
    ]
    for ground_truth in (truth, raw(dataset.name)):
        assert evaluate_coco(found, ground_truth)["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"file_name": ""}, "has file_name ''; expected a string, not empty"),
        ({"file_name": "a\0b"}, "has file_name 'a\\x00b'; expected a string"),
        ({"file_name": "\ud800.png"}, "has file_name '\\ud800.png'; expected a string"),
        ({"file_name": "new\nline.png"}, r"new\nline.png: no such file"),
        ({"file_name": "x" * 5000}, "xxxxx"),
        ({"file_name": "."}, "it is no file"),
        ({"height": 10**7}, "expected positive numbers of pixels, at most 1048576"),
    ],
)
def test_images_that_cannot_be(make, image, expected):
    entry = {"id": 0, "file_name": "0.png", "height": SIZE, "width": SIZE}
    message = message_of(CocoDataset, make(images=[entry | image, entry | {"id": 1}]))
    assert expected in message and len(message) < 1500


# what is left out is counted


def line_of(caplog, *args, **options):
    caplog.clear()
    with caplog.at_level("INFO", logger="domainnorm"):
        dataset = CocoDataset(*args, **options)
    assert len(caplog.messages) <= 1
    return dataset, "".join(caplog.messages)


def test_what_is_left_out_is_counted_in_one_line(make, caplog):
    assert line_of(caplog, make())[1] == ""
    _, line = line_of(caplog, make({"iscrowd": 1}, {}, {"iscrowd": 1}), keep_empty=False)
    assert "1 images, 1 objects; 2 crowds left out of training, 1 images without an object left out" in line
    assert [record.levelname for record in caplog.records] == ["INFO"]
    _, line = line_of(caplog, make({"bbox": [9, 9, 5, 0.5]}, {"bbox": [1, 1, 99, 9]}), invalid_boxes="skip")
    assert "1 boxes clipped to their image, 1 boxes under a pixel" in line and caplog.records[0].levelname == "WARNING"
    _, line = line_of(caplog, make({"bbox": [8, 30, 30, 20]}))
    assert "1 objects that are there twice (image, category and box)" in line
    images = [{"id": k, "file_name": "0.png", "height": SIZE, "width": SIZE} for k in (0, 1)]
    assert "1 images that are listed twice" in line_of(caplog, make(images=images))[1]


def test_what_vanishes_in_resizing_is_left_out_of_training_and_counted(make, caplog):
    """At the sizes 16 and 32, of 64 pixels: a side of 1.5 always vanishes, one of 3 at one of them."""
    name = make({"bbox": [1, 1, 1.5, 20]}, {"bbox": [1, 1, 3, 20]})
    dataset, line = line_of(caplog, name, trained_at=([16, 32], 100))
    assert [len(record.boxes) for record in dataset.records] == [1, 1]
    assert "1 objects left out as under a pixel at every size of INPUT.MIN_SIZE_TRAIN, 1 under a pixel at some" in line
    only = make(*[{"bbox": [1, 1, 1.5, 20]}] * 3)
    message = message_of(CocoDataset, only, trained_at=([16, 32], 100))
    assert "none of its 3 objects is left" in message and "3 objects left out as under a pixel" in message
    assert "none of its 3 objects" in message_of(train_loader, config(only), rank=0, world_size=1)
    assert len(CocoDataset(only)) == 2  # as a test set


def config(name, **options):
    return tiny.config(name, "out", INPUT__MIN_SIZE_TRAIN=[32], **options)


@pytest.mark.parametrize("options", [{}, {"invalid_boxes": "skip"}, {"keep_empty": False}])
def test_boxes_that_are_shares_of_the_image_are_refused(make, options):
    name = make(*[{"bbox": [0.25, 0.1, 0.5, 0.9]}] * 3)
    assert "all its 3 boxes lie between 0 and 1" in message_of(CocoDataset, name, **options)
    assert "in pixels" in message_of(make_test_loader, config(name), name, rank=0, world_size=1)


@pytest.mark.parametrize("options", [{}, {"invalid_boxes": "skip"}])
def test_corners_for_width_and_height_are_refused(make, options):
    """Clipped, they would be trained on: most as large as their image."""
    corners = [[k, 10 + k, 40 + k, 50 + k] for k in range(10)]
    entries = [{"id": k, "image_id": k % 2, "category_id": 3, "bbox": box} for k, box in enumerate(corners)]
    message = message_of(CocoDataset, make(annotations=entries), **options)
    assert "most of its 10 boxes reach outside of their image, unless they are x1, y1, x2 and y2" in message
    entries[0]["bbox"] = [30, 30, 20, 20]  # no pair of corners
    if options:
        assert len(CocoDataset(make(annotations=entries), **options)) == 2
    few = make(annotations=entries[1:])
    assert "(6 more boxes are invalid)" in message_of(CocoDataset, few)  # of nine it may be an accident


def test_nothing_to_use_is_refused(make):
    name = make(*[{"bbox": [90, 90, 5, 5]}] * 3)
    message = message_of(CocoDataset, name, invalid_boxes="skip")
    assert "none of its 3 objects is left to use: 3 objects dropped as invalid" in message
    empty = make(images=[], annotations=[])
    assert "no image to evaluate on" in message_of(make_test_loader, config(empty), empty, rank=0, world_size=1)


def test_images_in_both_sets_are_counted_once(make, caplog, tmp_path):
    train, test = make(folder="a"), make(folder="b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    third = f"{tmp_path}/a/annotations.json:{tmp_path}/link/"
    for _ in range(2):
        for name in (test, third, train):
            make_test_loader(config(train, DATASETS__TEST=[name]), name, rank=0, world_size=1)
    lines = [line for line in caplog.messages if "also in the training set" in line]
    assert lines == [f"{name}: 2 of its 2 images are also in the training set {train}" for name in (third, train)]


# shared arrays


def test_a_data_set_holds_arrays_and_no_objects_of_its_annotations(make):
    dataset = CocoDataset(make({"segmentation": [[1, 1, 9, 1, 9, 9]]}))
    columns = vars(dataset.records.columns)
    kinds = {key: type(value) for key, value in columns.items()}
    assert set(kinds.values()) <= {np.ndarray, Strings, str, list, type(None)} and kinds["categories"] is list


def test_strings():
    names = ["", "é", "\udcff", "", "b"]
    strings = Strings(names)
    assert list(strings) == names and len(strings) == 5 and list(strings.at(np.array([4, 1]))) == ["b", "é"]
    assert list(Strings([])) == []


def test_a_large_file_is_parsed_once_while_it_stays(make, monkeypatch):
    name, count = make(), []
    read = __import__("domainnorm.data.columns", fromlist=["_read"])._read
    monkeypatch.setattr("domainnorm.data.columns._KEPT_FROM", 1)
    monkeypatch.setattr("domainnorm.data.columns._read", lambda *args: count.append(1) or read(*args))
    first, second = CocoDataset(name), CocoDataset(name)
    assert len(count) == 1 and first.records.columns is second.records.columns
    first.relabel(["y", "x"], {})
    assert second[0][1]["labels"].tolist() == [0, 0] and first[0][1]["labels"].tolist() == [1, 1]
    make({"bbox": [0, 0, 1, 1]})
    assert CocoDataset(name)[0][1]["boxes"][0].tolist() == [0, 0, 1, 1] and len(count) == 2


@pytest.mark.parametrize("sides", [(480, 640), (7, 999), (1, 5000), (5000, 1), (333, 500)])
def test_the_size_of_training_is_as_it_is_computed(sides):
    for side in (3, 33, 800):
        image = torch.zeros(3, *sides, dtype=torch.uint8)
        found = ShortestSize([side], max_size=1333)(image).shape[1:]
        assert tuple(found) == tuple(resized(np.array([sides]), side, 1333)[0].tolist()) and min(found) >= 1
