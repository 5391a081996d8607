"""The built-in data set: the same bytes every time, annotations of exactly what is visible, never half a set."""

import hashlib
import json
import multiprocessing
import os

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from domainnorm.config import UserError
from domainnorm.data import CocoDataset, resolve_dataset
from domainnorm.data.cache import cache_root
from domainnorm.data.scene import CLASSES, LOOKS, MIN_VISIBLE, draw_scene
from domainnorm.data.shapes import COUNTS, SHAPES, VERSION, shapes_dataset

COUNT = 150


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A part of shapes_train, with masks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOMAINNORM_DATA", str(tmp_path_factory.mktemp("shapes")))
        file, images = shapes_dataset("shapes_train", COUNT)
    return CocoDataset(f"{file}:{images}", masks=True)


def digest(folder):
    """A hash of every file under `folder`, names included."""
    result = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        result.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return result.hexdigest()


def test_names():
    assert {"shapes_train", "shapes_val", "shapes_night_train", "shapes_night_val"} <= SHAPES.keys()
    assert len(SHAPES) == 2 * len(LOOKS) + 2 and {"herds_train", "herds_val"} <= SHAPES.keys()


def test_generated_once_on_first_use(cache, monkeypatch):
    monkeypatch.setitem(COUNTS, "val", 5)
    file, images = resolve_dataset("shapes_val")
    assert file.is_relative_to(cache) and len(list(images.iterdir())) == 5
    before = file.stat().st_mtime_ns
    assert resolve_dataset("shapes_val") == (file, images) and file.stat().st_mtime_ns == before
    dataset = CocoDataset("shapes_val")
    assert dataset.class_names == list(CLASSES) and dataset.category_ids == [1, 2, 3, 4]
    assert dataset[4][1]["domain"] == "day"


def test_same_bytes_twice_and_a_smaller_set_is_its_beginning(cache, monkeypatch):
    first, _ = shapes_dataset("shapes_night_val", 12)
    monkeypatch.setenv("DOMAINNORM_DATA", str(cache / "again"))
    second, _ = shapes_dataset("shapes_night_val", 12)
    assert first != second and digest(first.parent) == digest(second.parent)
    third, _ = shapes_dataset("shapes_night_val", 3)
    for path in (third.parent / "images").iterdir():
        assert path.read_bytes() == (first.parent / "images" / path.name).read_bytes()


def test_annotations_are_the_known_ones(shapes):
    """Guards against a change of the drawing without a new VERSION. Pixels may differ by rounding between platforms."""
    data = json.loads(shapes.annotation_file.read_text())
    layout = [(a["image_id"], a["category_id"], *(round(v / 4) for v in a["bbox"])) for a in data["annotations"][:40]]
    assert hashlib.sha256(repr(layout).encode()).hexdigest()[:16] == "f6fdb910979cf536"


def test_herds():
    """Small, many, all of one class; what a class looks like is a hint only."""
    file, images = shapes_dataset("herds_train", 60)
    data = CocoDataset(f"{file}:{images}")
    classes = []
    for image, target in data:
        assert image.shape == (3, 128, 128) and 5 <= len(target["labels"]) <= 11
        assert len(set(target["labels"].tolist())) == 1
        classes.append(int(target["labels"][0]))
        width, height = (target["boxes"][:, 2:] - target["boxes"][:, :2]).T
        assert max(width.max(), height.max()) <= 26
    assert min(classes.count(k) for k in range(4)) >= 5


def test_looks_and_splits_are_different_pictures():
    digests = {digest(shapes_dataset(name, 2)[1]) for name in SHAPES}
    assert len(digests) == len(SHAPES)


def test_looks_differ_in_their_statistics():
    means, contrasts = {}, {}
    for name, look in LOOKS.items():
        images = [draw_scene(look, np.random.default_rng(i)).image / 255 for i in range(30)]
        means[name] = np.mean([image.mean() for image in images])
        contrasts[name] = np.mean([np.ptp(image, axis=2).mean() for image in images])
    assert means["night"] < 0.2 < 0.3 < means["day"] < 0.5 < 0.6 < means["xray"]
    assert contrasts["xray"] < 0.1 < contrasts["day"]


def test_boxes_and_areas_are_those_of_the_visible_masks(shapes):
    areas = {a["id"]: a["area"] for a in json.loads(shapes.annotation_file.read_text())["annotations"]}
    for i in range(COUNT):
        target = shapes[i][1]
        masks = target["masks"].numpy()
        assert (masks.sum(axis=0) <= 1).all()  # a pixel shows one object
        ids = shapes.records[i].annotation_ids
        for mask, box, annotation_id in zip(masks, target["boxes"].tolist(), ids, strict=True):
            ys, xs = np.nonzero(mask)
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert areas[int(annotation_id)] == mask.sum()


def test_objects_show_enough_of_themselves():
    """Replays the occlusion from the outside: the last object is whole, an earlier one may be covered in part."""
    shares = []
    for i in range(60):
        scene = draw_scene(LOOKS["day"], np.random.default_rng(i))
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            ys, xs = np.nonzero(mask)
            box = (np.ptp(xs) + 1) * (np.ptp(ys) + 1)
            if CLASSES[label] == "disk":
                shares.append(mask.sum() / box / (np.pi / 4))
    assert min(shares) > MIN_VISIBLE / 2 and np.median(shares) > 0.9


def test_the_set_is_a_detection_problem(shapes):
    targets = [shapes[i][1] for i in range(COUNT)]
    counts = np.array([len(target["boxes"]) for target in targets])
    assert 1 <= (counts == 0).sum() <= 20 and counts.max() <= 6 and 2 < counts.mean() < 3
    labels = np.concatenate([target["labels"].numpy() for target in targets])
    assert np.bincount(labels, minlength=4).min() > len(labels) / 8
    boxes = np.concatenate([target["boxes"].numpy() for target in targets])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert sides.min() < 12 and sides.max() > 90
    orientations = [np.sign(width - height) for height, width in shapes.sizes]
    assert min(orientations.count(o) for o in (-1, 0, 1)) > COUNT / 20


def test_masks_are_rle_that_pycocotools_reads(shapes):
    annotation = json.loads(shapes.annotation_file.read_text())["annotations"][0]
    assert coco_mask.area(annotation["segmentation"]) == annotation["area"]


def generate(start):
    start.wait()
    shapes_dataset("shapes_train", 25)


@pytest.mark.slow
def test_two_processes_at_once(cache):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=generate, args=(start,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    (folder,) = (cache / f"shapes-v{VERSION}").iterdir()  # and no drafts
    assert len(CocoDataset(f"{folder / 'annotations.json'}:{folder / 'images'}")) == 25


def test_an_interrupted_generation_leaves_nothing_to_be_found(cache, monkeypatch):
    def interrupted(*args):
        interrupted.calls += 1
        if interrupted.calls == 4:
            raise KeyboardInterrupt
        return draw_scene(*args)

    interrupted.calls = 0
    monkeypatch.setattr("domainnorm.data.shapes.draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes_dataset("shapes_val", 6)
    assert list((cache / f"shapes-v{VERSION}").iterdir()) == []
    file, images = shapes_dataset("shapes_val", 6)
    assert file.is_file() and len(list(images.iterdir())) == 6


def test_the_set_may_be_read_by_others():
    assert shapes_dataset("shapes_val", 1)[0].parent.stat().st_mode & 0o055 == 0o055


def test_a_folder_that_cannot_be_written(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("DOMAINNORM_DATA", str(cache / "file"))
    with pytest.raises(UserError, match="DOMAINNORM_DATA"):
        shapes_dataset("shapes_val", 1)


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("DOMAINNORM_DATA")
    monkeypatch.setenv("HOME", os.environ.get("TMPDIR", "/tmp"))
    assert cache_root().parts[-2:] == (".cache", "domainnorm") and "~" not in cache_root().parts
