"""Masks from the annotation file to the batch."""

import itertools

import pytest
import tiny
import torch
from triangles import HEIGHT, SQUARES, Oracle, config, rle, triangle, write

from domainnorm.config import UserError
from domainnorm.data import num_classes, train_loader
from domainnorm.data import test_loader as make_test_loader
from domainnorm.evaluation import evaluate


@pytest.fixture
def name(tmp_path):
    return write(tmp_path / "data")


def samples(cfg, count=12):
    batches = train_loader(cfg, rank=0, world_size=1)
    found = [s for images, targets in itertools.islice(batches, count // 4) for s in zip(images, targets, strict=True)]
    batches.close()
    return found


# training


@pytest.mark.parametrize("workers", [0, 1])
def test_masks_are_resized_and_flipped_with_the_image(name, tmp_path, workers):
    sizes = [HEIGHT, 2 * HEIGHT]
    cfg = config(name, tmp_path, INPUT__MIN_SIZE_TRAIN=sizes, DATALOADER__NUM_WORKERS=workers)
    seen = set()
    for image, target in samples(cfg, 24):
        masks = target["masks"]
        assert type(masks) is torch.Tensor and masks.dtype == torch.uint8
        assert masks.shape == (len(target["boxes"]), *image.shape[1:]) and masks.max() == 1
        assert torch.equal(masks.amax(0) == 1, image[1] > 0.5)
        for mask, (x0, y0, x1, y1) in zip(masks.bool(), target["boxes"].tolist(), strict=True):
            ys, xs = mask.nonzero(as_tuple=True)
            assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == [x0, y0, x1, y1]
            flipped = bool(mask[int(y0), int(x1) - 1])  # the corner above the diagonal
        seen.add((image.shape[1], flipped))
    assert seen == set(itertools.product(sizes, (False, True)))


def test_a_flipped_run_is_the_mirror_image_of_a_plain_one(name, tmp_path):
    """Also at scales that are no whole numbers."""
    runs = [
        samples(config(name, tmp_path, INPUT__RANDOM_FLIP=p, INPUT__MIN_SIZE_TRAIN=[31, 77, 50])) for p in (0.0, 1.0)
    ]
    for (image, target), (mirrored, other) in zip(*runs, strict=True):
        assert torch.equal(image.flip(-1), mirrored) and torch.equal(target["masks"].flip(-1), other["masks"])


def test_the_mask_of_a_dropped_box_is_dropped(tmp_path):
    """What SanitizeBoundingBoxes is trusted to do: of three objects, the middle one shrinks below a pixel."""
    name = write(tmp_path / "data", [[(2, 4, 16), (40, 40, 1), (30, 10, 24)]])
    (image, target), *_ = samples(config(name, tmp_path, INPUT__MIN_SIZE_TRAIN=[HEIGHT // 2], INPUT__RANDOM_FLIP=0.0))
    assert target["boxes"].tolist() == [[1, 2, 9, 10], [15, 5, 27, 17]] and len(target["labels"]) == 2
    assert target["masks"].shape == (2, *image.shape[1:])
    for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        x0, y0, x1, y1 = box
        assert 0 < mask.sum() == mask[y0:y1, x0:x1].sum()


def test_images_without_objects_have_no_masks(name, tmp_path):
    cfg = config(name, tmp_path, DATALOADER__FILTER_EMPTY_ANNOTATIONS=False, INPUT__MIN_SIZE_TRAIN=[30])
    shapes = {tuple(target["masks"].shape) for _, target in samples(cfg) if not len(target["boxes"])}
    assert shapes == {(0, 30, 40)}


def test_a_model_without_masks_gets_the_same_but_masks(name, tmp_path):
    masks = samples(config(name, tmp_path, INPUT__MIN_SIZE_TRAIN=[30, 60]))
    for cfg in (
        config(name, tmp_path, INPUT__MIN_SIZE_TRAIN=[30, 60], MODEL__MASK_ON=False, MODEL__ROI_MASK_HEAD__NORM=""),
        tiny.config(name, tmp_path, INPUT__MIN_SIZE_TRAIN=[30, 60], INPUT__MAX_SIZE_TRAIN=1000),
    ):
        for (image, target), (plain_image, plain) in zip(masks, samples(cfg), strict=True):
            assert torch.equal(image, plain_image) and torch.equal(target["boxes"], plain["boxes"])
            assert target.keys() - plain.keys() == {"masks"} and plain.keys() < target.keys()


# the test set


def test_evaluation_checks_the_masks_without_decoding_them(name, tmp_path, monkeypatch):
    monkeypatch.setattr("domainnorm.data.masks.Segmentations.mask", lambda *_: 1 / 0)
    loader = make_test_loader(config(name, tmp_path), name, rank=0, world_size=1)
    assert all("masks" not in target for _, targets in loader for target in targets)
    assert loader.dataset.ground_truth()["annotations"][0]["segmentation"] == rle(triangle(*SQUARES[0][0]))


@pytest.mark.parametrize("invalid", ["error", "skip"])
@pytest.mark.parametrize("segmentation", [None, []])
def test_a_test_set_without_masks_is_refused(name, tmp_path, segmentation, invalid):
    other = write(tmp_path / "other", segmentation=lambda *_: segmentation)
    cfg = config(name, tmp_path / "out", DATASETS__TEST=[other], DATALOADER__INVALID_BOXES=invalid)
    with pytest.raises(UserError, match=r"^annotation file .*other/annotations.json: none .* MODEL.MASK_ON False$"):
        evaluate(cfg, Oracle())
    with pytest.raises(UserError, match=r"none of its 3 objects has a segmentation"):
        train_loader(config(other, tmp_path / "out", DATALOADER__INVALID_BOXES=invalid), rank=0, world_size=1)
    tiny_cfg = tiny.config(name, tmp_path / "out", DATASETS__TEST=[other])
    make_test_loader(tiny_cfg, other, rank=0, world_size=1)  # boxes are all it takes


def test_a_test_set_with_one_mask_missing(name, tmp_path):
    other = write(tmp_path / "other", segmentation=lambda x, y, side: rle(triangle(x, y, side)) if x > 2 else None)
    with pytest.raises(UserError, match=r"annotation 0 \(image 0.png.* segmentation .*INVALID_BOXES skip"):
        make_test_loader(config(name, tmp_path), other, rank=0, world_size=1)
    cfg = config(name, tmp_path, DATALOADER__INVALID_BOXES="skip")
    truth = make_test_loader(cfg, other, rank=0, world_size=1).dataset.ground_truth()
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2]


def test_a_test_set_without_objects_can_be_predicted(name, tmp_path):
    empty = write(tmp_path / "empty", [[], []])
    assert len(make_test_loader(config(name, tmp_path), empty, rank=0, world_size=1)) == 2


def test_the_number_of_classes_is_that_of_the_architecture(name, tmp_path):
    assert num_classes(config(name, tmp_path)) == 1
    assert num_classes(config(name, tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=5, MODEL__RETINANET__NUM_CLASSES=7)) == 5
    assert num_classes(tiny.config(name, tmp_path, MODEL__RETINANET__NUM_CLASSES=7)) == 7
    two = tiny.write_dataset(tmp_path / "two")
    with pytest.raises(UserError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES 1 contradicts .*2 categories"):
        train_loader(config(two, tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=1), rank=0, world_size=1)


@pytest.mark.parametrize(("make", "head"), [(config, "ROI_HEADS"), (tiny.config, "RETINANET")])
def test_no_number_of_classes(name, tmp_path, make, head):
    with pytest.raises(UserError, match=rf"name a data set, or set MODEL\.{head}\.NUM_CLASSES$"):
        num_classes(make(name, tmp_path, DATASETS__TRAIN=[]))
