"""Masks from the annotation file to AP: through the loader, the predictions and COCO's evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pycocotools import mask as coco_mask
from torch import nn

from domainnorm.config import UserError
from domainnorm.data import num_classes, train_loader
from domainnorm.data import test_loader as make_test_loader
from domainnorm.evaluation import evaluate, predict
from domainnorm.evaluation.compare import format_table


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set", count=6)


def config(data_set, output, **others):
    return tiny.config(data_set, output, DATASETS__TEST=[data_set], **(tiny.MASK_RCNN | others))


def without_segmentations(data_set, folder):
    file, images = data_set.rsplit(":", 1)
    content = json.loads(Path(file).read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    folder.mkdir()
    (folder / "boxes.json").write_text(json.dumps(content))
    return f"{folder / 'boxes.json'}:{images}"


def test_training_batches_have_the_masks_that_go_with_their_boxes(data_set, tmp_path):
    cfg = config(data_set, tmp_path, INPUT__MIN_SIZE_TRAIN=[32, 48], INPUT__MAX_SIZE_TRAIN=48)
    batches = train_loader(cfg, rank=0, world_size=1)
    flipped = set()
    for _ in range(6):
        for image, target in zip(*next(batches), strict=True):
            masks = target["masks"]
            assert type(masks) is torch.Tensor and masks.dtype == torch.uint8
            assert masks.shape == (len(target["boxes"]), *image.shape[1:])
            (mask,), (box,) = masks, target["boxes"].round().int().tolist()
            ys, xs = mask.nonzero(as_tuple=True)
            extent = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            assert extent == pytest.approx(box, abs=1.01)
            flipped.add(abs(box[0] - box[1]) > 2)  # the squares lie on the diagonal
            inside = image[:, mask.bool()]
            assert float(inside.std(dim=1).max()) < 0.25  # one colour, but for the border
    assert flipped == {True, False}


def test_boxes_alone_decode_no_mask(data_set, tmp_path):
    _, targets = next(train_loader(tiny.config(data_set, tmp_path), rank=0, world_size=1))
    assert "masks" not in targets[0]


def test_a_set_without_segmentations_is_refused_at_once(data_set, tmp_path):
    boxes = without_segmentations(data_set, tmp_path / "boxes")
    with pytest.raises(UserError, match=r"boxes\.json.*segmentation"):
        train_loader(config(boxes, tmp_path), rank=0, world_size=1)
    with pytest.raises(UserError, match=r"boxes\.json.*segmentation"):
        make_test_loader(config(data_set, tmp_path), boxes, rank=0, world_size=1)
    make_test_loader(
        config(data_set, tmp_path, MODEL__MASK_ON=False, MODEL__ROI_MASK_HEAD__NORM=""), boxes, rank=0, world_size=1
    )


def test_the_number_of_classes_is_that_of_the_architecture(data_set, tmp_path):
    assert num_classes(config(data_set, tmp_path)) == 2
    assert (
        num_classes(config(data_set, tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=5, MODEL__RETINANET__NUM_CLASSES=7)) == 5
    )
    assert num_classes(tiny.config(data_set, tmp_path, MODEL__RETINANET__NUM_CLASSES=7)) == 7
    with pytest.raises(UserError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES 1 contradicts .*2 categories"):
        train_loader(config(data_set, tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=1), rank=0, world_size=1)


class Oracle(nn.Module):
    """Says what the annotation file says, with its masks changed by `change`; images are told by their order."""

    def __init__(self, data_set, change=lambda mask: mask):
        super().__init__()
        self.content = json.loads(Path(data_set.rsplit(":", 1)[0]).read_text())
        self.change = change
        self.next = 0

    def forward(self, images):
        found = []
        for image in images:
            (annotation,) = (a for a in self.content["annotations"] if a["image_id"] == 10 + self.next % 6)
            self.next += 1
            x, y, width, height = annotation["bbox"]
            mask = torch.zeros(image.shape[1:])
            mask[y : y + height, x : x + width] = 0.5  # just enough
            found.append(
                {
                    "boxes": torch.tensor([[x, y, x + width, y + height]]),
                    "labels": torch.tensor([tiny.CATEGORY_IDS.index(annotation["category_id"])]),
                    "scores": torch.tensor([0.9]),
                    "masks": self.change(mask)[None, None],
                }
            )
        return found


def test_a_predicted_mask_is_the_rle_of_at_least_a_half(data_set, tmp_path):
    loader = make_test_loader(config(data_set, tmp_path), data_set, rank=0, world_size=1)
    results = predict(
        Oracle(data_set, lambda mask: mask + torch.rand(mask.shape).round() * 0.49), loader, torch.device("cpu")
    )
    json.dumps(results)
    for result, (_, target) in zip(results, (loader.dataset[i] for i in range(6)), strict=True):
        assert np.array_equal(coco_mask.decode(result["segmentation"]), target["masks"][0].numpy())


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [(lambda m: m, 99.99, 100.01), (lambda m: m.tril(-1), 0, 5), (lambda m: m * 0, 0, 0), (lambda m: m * 0 + 1, 0, 60)],
    ids=["perfect", "half", "empty", "everywhere"],
)
def test_box_and_mask_ap(data_set, tmp_path, capsys, change, low, high):
    results = evaluate(config(data_set, tmp_path), Oracle(data_set, change))
    assert results["population"]["bbox"]["AP"] == pytest.approx(100)
    assert low <= results["population"]["segm"]["AP"] <= high
    assert json.loads((tmp_path / "results.json").read_text())["population"].keys() == {"bbox", "segm"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["population", "bbox"], ["population", "segm"]]


def test_a_table_of_several_sets_names_statistics_set_and_kind():
    scores = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 12.5)
    table = format_table({"minibatch": {name: {"bbox": scores, "segm": scores} for name in ("a", "b")}})
    labels = [line.split("  ")[0] for line in table.splitlines()]
    assert labels == ["statistics", "minibatch a bbox", "minibatch a segm", "minibatch b bbox", "minibatch b segm"]
