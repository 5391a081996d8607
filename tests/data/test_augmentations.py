"""Augmentations by keys: what they do to image, boxes and masks; drawn by the seed of the sample alone."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from ranks import run_ranks

from domainnorm.config import load_config
from domainnorm.data import train_loader, training_sets
from domainnorm.data.workers import num_workers
from domainnorm.distributed import local_world_size
from domainnorm.engine import train
from domainnorm.errors import UserError

ALL = {
    "INPUT__RANDOM_VERTICAL_FLIP": 0.5,
    "INPUT__PHOTOMETRIC_DISTORT": 0.5,
    "INPUT__RANDOM_IOU_CROP": 0.7,
    "INPUT__SCALE_JITTER": [0.4, 2.0],
}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Images (60, 80), dark but for a bright rectangle, whose box and polygon the file has; and an empty one."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "images").mkdir()
    images, annotations = [], []
    for k in range(6):
        pixels = np.full((60, 80, 3), 20, dtype=np.uint8)
        x, y, width, height = 5 + 9 * k, 30 - 5 * k, 12 + k, 10
        if k < 5:
            pixels[y : y + height, x : x + width] = (200, 120, 60)
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(
                {"id": k, "image_id": k, "category_id": 0, "bbox": [x, y, width, height], "segmentation": [polygon]}
            )
        Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "width": 80, "height": 60})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "a"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return f"{folder / 'a.json'}:{folder / 'images'}"


def config(data_set, **choices):
    words = {"INPUT__MIN_SIZE_TRAIN": [120], "INPUT__MAX_SIZE_TRAIN": 160, "INPUT__RANDOM_FLIP": 0.0} | choices
    masks = {"MODEL__META_ARCHITECTURE": "GeneralizedRCNN", "MODEL__MASK_ON": True}
    return tiny.config(data_set, Path("unused"), **{"MODEL__RETINANET__NORM": ""} | masks | words)


def samples(cfg, rounds=12):
    (dataset,) = training_sets(cfg)
    for seed in range(rounds):
        for index in range(len(dataset)):
            torch.manual_seed(seed)
            yield dataset[index]


def bright(image):
    """XYXY of what is bright."""
    y, x = (image.amax(0) > 0.4).nonzero(as_tuple=True)
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


@pytest.mark.parametrize("key", [*ALL, "all"])
def test_boxes_and_masks_follow_their_objects(data_set, key):
    choices = ALL if key == "all" else {key: ALL[key]}
    choices = choices | ({} if key == "INPUT__PHOTOMETRIC_DISTORT" else {"INPUT__PHOTOMETRIC_DISTORT": 0.0})
    seen = set()
    for image, target in samples(config(data_set, **choices)):
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) <= 1
        seen.add((tuple(image.shape), tuple(target["boxes"].flatten().round().tolist())))
        if len(target["boxes"]) and key != "INPUT__PHOTOMETRIC_DISTORT":
            assert (bright(image) - target["boxes"][0]).abs().max() <= 2.5
            inside = target["masks"][0].bool()
            assert (inside ^ (image.amax(0) > 0.4)).float().mean() < 0.02
    assert len(seen) > (5 if key in ("INPUT__PHOTOMETRIC_DISTORT",) else 8) - 1


def test_vertical_flip(data_set):
    plain, flipped = (list(samples(config(data_set, INPUT__RANDOM_VERTICAL_FLIP=p), 1)) for p in (0.0, 1.0))
    for (image, target), (other, other_target) in zip(plain, flipped, strict=True):
        assert torch.equal(image.flip(1), other)
        expected = target["boxes"][:, [0, 3, 2, 1]]
        expected[:, 1::2] = 120 - expected[:, 1::2]
        torch.testing.assert_close(other_target["boxes"].as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_scale_jitter_is_of_the_longer_side_and_bounded(data_set):
    sides = []
    for image, target in samples(config(data_set, INPUT__SCALE_JITTER=[0.5, 2.0]), 30):
        height, width = image.shape[1:]
        assert width <= 160 and height <= 160
        sides.append(width)
        if width < 160:
            assert abs(height - width * 60 / 80) <= 1  # whole
        for box in target["boxes"]:
            assert (box >= 0).all() and box[2] <= width and box[3] <= height
    assert min(sides) < 90 and sides.count(160) > len(sides) / 2  # of a factor above 1, two thirds
    fixed = {tuple(image.shape[1:]) for image, _ in samples(config(data_set, INPUT__SCALE_JITTER=[0.5, 0.5]), 2)}
    assert fixed == {(60, 80)}


def test_iou_crops_have_an_object_and_come_as_often_as_said(data_set):
    whole = {tuple(image.shape[1:]) for image, _ in samples(config(data_set, INPUT__RANDOM_IOU_CROP=0.0), 2)}
    assert whole == {(120, 160)}
    cropped, count = 0, 0
    for image, target in samples(config(data_set, INPUT__RANDOM_IOU_CROP=1.0), 40):
        assert len(target["boxes"]) == 1
        count += 1
        cropped += tuple(image.shape[1:]) != (120, 160)
    assert 0.4 < cropped / count < 0.9  # one option of seven, and small objects, leave an image as it is


def test_an_image_without_objects_is_augmented_too(data_set):
    cfg = config(data_set, DATALOADER__FILTER_EMPTY_ANNOTATIONS=False, **ALL)
    assert {len(target["boxes"]) for _, target in samples(cfg)} == {0, 1}


def test_colours_change_and_nothing_else(data_set):
    plain = list(samples(config(data_set), 3))
    distorted = list(samples(config(data_set, INPUT__PHOTOMETRIC_DISTORT=1.0), 3))
    for (image, target), (other, other_target) in zip(plain, distorted, strict=True):
        assert not torch.equal(image, other) and torch.equal(target["boxes"], other_target["boxes"])
        assert torch.equal(target["masks"], other_target["masks"])


def test_the_defaults_draw_what_they_drew():
    """Keys that are off must not move the random numbers of the others: runs go on with a later version."""
    cfg = load_config(None, ["DATASETS.TRAIN", ["shapes_train"], "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
    from domainnorm.data.transforms import train_transforms

    names = [type(transform).__name__ for transform in train_transforms(cfg).transforms]
    assert names == ["ShortestSize", "RandomHorizontalFlip", "ClampBoundingBoxes", "SanitizeBoundingBoxes", "ToDtype"]


def test_a_classifier_is_flipped_and_coloured(tmp_path):
    file = tmp_path / "a.npz"
    pixels = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    pixels[:, :4] = (200, 100, 50)
    np.savez(file, images=pixels, labels=np.array([0, 1, 0, 1]))

    def images(**choices):
        words = {"META_ARCHITECTURE": "Classifier", "BACKBONE__NORM": "BN", "RETINANET__NORM": ""}
        words = {f"MODEL__{key}": value for key, value in words.items()} | choices
        cfg = tiny.config(str(file), tmp_path, INPUT__CROP="none", INPUT__CROP_SIZE=8, INPUT__RANDOM_FLIP=0.0, **words)
        return next(train_loader(cfg, rank=0, world_size=1))[0]

    plain = images()
    for image, flipped in zip(plain, images(INPUT__RANDOM_VERTICAL_FLIP=1.0), strict=True):
        assert torch.equal(image.flip(1), flipped) and not torch.equal(image, flipped)
    for image, distorted in zip(plain, images(INPUT__PHOTOMETRIC_DISTORT=1.0), strict=True):
        assert not torch.equal(image, distorted) and (distorted[:, 4:] == distorted[:, 7:8, :1]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_with_all_of_them_is_equal_to_the_bit(data_set, tmp_path, workers):
    def run(folder, resume=False, **choices):
        cfg = tiny.config(
            *(data_set, tmp_path / folder),
            **{"DATALOADER__NUM_WORKERS": workers, "INPUT__MAX_SIZE_TRAIN": 160, "SOLVER__BASE_LR": 0.01}
            | ALL
            | choices,
        )
        return train(cfg, resume=resume).state_dict()

    whole = run("whole", DATALOADER__NUM_WORKERS=0)
    run("parts", SOLVER__MAX_ITER=2)
    parts = run("parts", resume=True)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_images_that_jitter_makes_too_small_are_told_before_training(data_set, tmp_path):
    words = {"INPUT__MAX_SIZE_TRAIN": 160, "INPUT__SCALE_JITTER": [0.2, 1.0], "SOLVER__IMS_PER_BATCH": 1}
    with pytest.raises(UserError) as error:
        train(tiny.config(data_set, tmp_path / "out", MODEL__NORM__EPS=1e-5, **words))
    assert "INPUT.SCALE_JITTER [0.2, 1.0]: an image of 60 x 80 pixels may become 24 x 32" in str(error.value)
    assert "raise INPUT.SCALE_JITTER or" in str(error.value) and not (tmp_path / "out").exists()


# --- processes that load --------------------------------------------------------------------------------------------


def _workers(_, cfg):
    return num_workers(cfg), local_world_size()


def test_workers_by_the_machine(monkeypatch):
    cfg = load_config(None, ["DATALOADER.NUM_WORKERS", -1])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, expected in ((1, 1), (6, 6), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert num_workers(cfg) == expected
    assert num_workers(load_config(None, ["DATALOADER.NUM_WORKERS", 3])) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # left by another launcher: this is one process
    assert local_world_size() == 1


@pytest.mark.slow
def test_workers_of_two_ranks(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = len(os.sched_getaffinity(0))
    found = run_ranks(_workers, 2, load_config(None, ["DATALOADER.NUM_WORKERS", -1]))
    assert found == [(max(cores // 2, 1), 2)] * 2


def test_a_loader_with_workers_by_the_machine(data_set):
    cfg = config(data_set, DATALOADER__NUM_WORKERS=-1, **ALL)
    alone = config(data_set, DATALOADER__NUM_WORKERS=0, **ALL)
    ours, theirs = (next(train_loader(c, rank=0, world_size=1))[0] for c in (cfg, alone))
    assert all(map(torch.equal, ours, theirs))
