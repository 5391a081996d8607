"""Images with what was predicted: which ones, and which predictions."""

import numpy as np
import pytest
import tiny
import torch

from domainnorm.data import ClassificationDataset, CocoDataset
from domainnorm.evaluation import pictures
from domainnorm.evaluation.pictures import class_name, draw_detections, draw_some


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: of each picture the image, the objects and the predictions."""
    calls = []

    def side_by_side(*arguments):
        calls.append(arguments)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    monkeypatch.setattr(pictures, "side_by_side", side_by_side)
    return calls


@pytest.fixture
def dataset(tmp_path):
    dataset = CocoDataset(tiny.write_dataset(tmp_path, count=7), transforms=lambda image, target: 1 / 0)
    dataset.masks = True
    return dataset


def prediction(image_id, score, category=7, box=(1, 2, 3, 4)):
    return {"image_id": image_id, "category_id": category, "bbox": list(box), "score": score}


def test_images_are_taken_evenly_and_the_best_predictions_as_many_as_objects(dataset, drawn):
    found = [prediction(10, 0.2), prediction(10, 0.9, 3), prediction(13, 0.1), prediction(11, 0.8), prediction(10, 0.5)]
    assert list(draw_some(dataset, found, 3)) == ["0.png", "3.png", "6.png"]
    (image, truth, first, classes), (_, _, second, _), (_, _, third, _) = drawn
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and classes == ["kind 3", "kind 7"]
    assert truth.boxes.tolist() == [[4, 4, 24, 24]] and truth.names == ["kind 3"] and truth.masks is None
    assert first.boxes.tolist() == [[1, 2, 4, 6]] and first.names == ["kind 3"] and first.scores == [0.9]
    assert second.scores == [0.1] and third.scores == [] and third.boxes.shape == (0, 4)


@pytest.mark.parametrize(("count", "files"), [(0, []), (1, [0]), (2, [0, 6]), (7, range(7)), (99, range(7))])
def test_how_many(dataset, drawn, count, files):
    assert list(draw_some(dataset, [], count)) == [f"{k}.png" for k in files]


def test_the_data_set_is_left_as_it_was(dataset, drawn):
    before = dict(vars(dataset))
    draw_some(dataset, [], 3)
    assert vars(dataset) == before


def test_predicted_masks_are_drawn_with_those_of_the_objects(tmp_path, drawn):
    dataset = CocoDataset(tiny.write_dataset(tmp_path, count=2), masks=True)
    mask = np.zeros((64, 64), np.uint8, order="F")
    mask[1:5, 2:9] = 1
    rle = pictures.coco_mask.encode(mask)
    draw_detections(dataset, 0, [prediction(10, 0.5) | {"segmentation": rle}])
    ((_, truth, found, _),) = drawn
    assert np.array_equal(found.masks[0].numpy(), mask == 1) and found.masks.dtype == torch.bool
    assert truth.masks[0, 10, 10] and not truth.masks[0, 40, 40]


def test_images_of_a_classifier_have_both_classes(tmp_path, drawn):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 9), np.uint8), labels=[0, 1, 1], class_names=["cat", "dog"])
    dataset = ClassificationDataset(str(tmp_path / "a.npz"))
    found = [{"image_id": k, "label": label, "predicted": [2 - k], "loss": 0.0} for k, label in enumerate((0, 1, 1))]
    assert list(draw_some(dataset, [*found, found[0] | {"predicted": [1]}], 2)) == ["a.npz[0]", "a.npz[2]"]
    (_, truth, first, _), (_, _, last, _) = drawn
    assert truth.names == ["cat"] and truth.boxes.tolist() == [[0, 0, 8, 7]]
    assert first.names == ["class 2"] and last.names == ["cat"]  # the model may have more classes; the first of two
    assert class_name(["a"], 0) == "a"
