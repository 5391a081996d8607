"""An image twice, with its objects and with what was predicted."""

import pytest
import torch

from domainnorm.visualization.draw import color_of
from domainnorm.visualization.pairs import Objects, fit, side_by_side

CLASSES = ["cat", "dog"]


def objects(*boxes, **others):
    return Objects(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), [""] * len(boxes), **others)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((40, 80), (160, 320)), ((400, 300), (400, 300)), ((1000, 2000), (256, 512)), ((1, 9000), (1, 512))],
)
def test_small_images_are_enlarged_and_large_ones_reduced(size, expected):
    assert fit(torch.zeros(3, *size, dtype=torch.uint8)).shape[1:] == expected


def test_boxes_are_where_they_are_in_the_image():
    image = torch.full((3, 40, 80), 9, dtype=torch.uint8)
    truth = Objects(torch.tensor([[10.0, 5, 50, 30]]), ["dog"])
    picture = side_by_side(image, truth, objects(), CLASSES)
    assert picture.shape == (3, 160, 646) and picture.dtype == torch.uint8
    left, gap, right = picture[:, :, :320], picture[:, :, 320:326], picture[:, :, 326:]
    assert (gap == 255).all() and (right == 9).all()
    dog = torch.tensor(color_of("dog", CLASSES))
    assert (left[:, 120, 100] == dog).all() and (left[:, 60, 40] == dog).all()  # its lower and left border
    assert (left[:, 60, 50] == 9).all()


def test_masks_and_scores_of_predictions():
    image = torch.zeros(3, 320, 320, dtype=torch.uint8)
    mask = torch.zeros(1, 320, 320, dtype=torch.bool)
    mask[:, 100:200, 100:200] = True
    found = Objects(torch.tensor([[100.0, 100, 200, 200]]), ["cat"], [0.5], mask)
    with_score = side_by_side(image, objects(), found, CLASSES)[:, :, 326:]
    assert (with_score[:, 150, 150] > 0).any() and (with_score[:, 50, 50] == 0).all()
    without = side_by_side(image, objects(), Objects(found.boxes, ["cat"], None, mask), CLASSES)[:, :, 326:]
    assert not torch.equal(with_score, without)
