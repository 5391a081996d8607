"""The table of the data sets in the log of a training, and its plots."""

import json
import logging
import re
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from domainnorm.data import test_loader as loader_of
from domainnorm.data import training_sets
from domainnorm.data.statistics import statistics_of
from domainnorm.engine import train
from domainnorm.engine.describe_data import describe_data, draw_data
from domainnorm.modeling import build_model


def write(folder, boxes, *, size=(64, 64), categories=("cat", "dog"), crowds=(), first=0):
    """An image for each list of (class, x, y, width, height)."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for k, own in enumerate(boxes):
        Image.new("RGB", size, (k, 90, 90)).save(folder / "images" / f"{first + k}.png")
        images.append({"id": k + 1, "file_name": f"{first + k}.png", "width": size[0], "height": size[1]})
        for label, *box in own:
            annotations.append({"id": len(annotations), "image_id": k + 1, "category_id": label, "bbox": box})
    for row in crowds:
        annotations[row]["iscrowd"] = 1
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(categories)],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return f"{folder / 'a.json'}:{folder / 'images'}"


def report_of(cfg):
    tests = [loader_of(cfg, name, rank=0, world_size=1).dataset for name in cfg.DATASETS.TEST]
    return describe_data(cfg, build_model(cfg), training_sets(cfg), tests)


def cells(text, beginning):
    (line,) = [line for line in text.splitlines() if line.startswith(beginning)]
    return re.split(r"  +", line)


@pytest.fixture
def names(tmp_path):
    boxes = [[(0, 0, 0, 16, 16), (0, 16, 16, 32, 32), (1, 0, 0, 50, 50)], [], [(0, 0, 0, 16, 16), (0, 3, 3, 0.2, 9)]]
    one = write(tmp_path / "one", boxes, crowds=[2])
    return one, write(tmp_path / "other", [[(1, 0, 0, 10, 40)]], first=9)


def test_the_table(names, tmp_path):
    one, other = names
    cfg = tiny.config(
        one,
        tmp_path / "out",
        **{"DATASETS__TEST": [other, one], "INPUT__MIN_SIZE_TRAIN": [128], "INPUT__MAX_SIZE_TRAIN": 128},
        **{"MODEL__ANCHOR_GENERATOR__SIZES": [32, 64, 128, 256, 512], "SOLVER__MAX_ITER": 5},
    )
    report = report_of(cfg)
    lines = report.text.splitlines()
    head = re.split(r"  +", lines[1])
    rows = [dict(zip(head, re.split(r"  +", line), strict=True)) for line in lines[2:5]]
    assert [row["images"] for row in rows] == ["2", "1", "3"]  # of training without the empty one
    assert [row["objects"] for row in rows] == ["3", "1", "4"] and [row["crowds"] for row in rows] == ["1", "0", "1"]
    assert [row["without"] for row in rows] == ["0", "0", "1"] and rows[0]["of an image"] == "1.5"
    assert rows[0]["√area"] == "32 32 61"  # twice as large as in the file
    assert rows[0]["epochs"] == "10" and rows[1]["epochs"] == "-"
    assert [row["in training, too"] for row in rows] == ["-", "0", "3"]
    assert cells(report.text, "cat") == ["cat", "3", "100.0 %", "4"]
    assert cells(report.text, "dog") == ["dog", "0", "0.0 %", "1"]
    assert "1 objects left out as under a pixel" in report.text or "1 under a pixel at some" in report.text
    assert "1 crowds left out of training, 1 images without an object left out" in report.text
    assert [line.partition(": ")[2] for line in report.warnings] == ["nothing of the classes dog"]


def test_anchors_that_do_not_fit_are_told(names, tmp_path):
    fits = tiny.config(names[0], tmp_path / "out", MODEL__ANCHOR_GENERATOR__SIZES=[8, 16, 32, 64, 128])
    large = tiny.config(names[0], tmp_path / "out", MODEL__ANCHOR_GENERATOR__SIZES=[128, 256, 512, 600, 700])
    good, bad = report_of(fits), report_of(large)
    assert float((good.best_ious > 0.5).float().mean()) > 0.6 and float((bad.best_ious < 0.4).float().mean()) == 1
    assert re.split(r"  +", bad.text.splitlines()[2])[-3:-1] == ["100.0 %", "100.0 %"]
    warning = bad.warnings[-1]
    assert "100 % of the objects have no anchor of an IoU of 0.5" in warning and "\n" not in warning
    assert "SIZES [128, 256, 512, 600, 700]" in warning and "the anchors 128 to" in warning
    assert not any("anchor" in line for line in good.warnings)


def test_many_classes_are_cut(tmp_path):
    classes = [f"class {k:02}" for k in range(50)]
    boxes = [[(k, 1, 1, 30, 30)] * (k + 1) for k in range(50)]
    cfg = tiny.config(write(tmp_path / "set", boxes, categories=classes), tmp_path / "out")
    lines = report_of(cfg).text.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("class "))
    assert len(lines) == at + 22 and lines[at + 11] == "… 30 classes between"
    assert lines[at + 1].startswith("class 49") and lines[-1].startswith("class 00")


def test_ratios_make_epochs(names, tmp_path):
    sets = {"DATASETS__TRAIN": list(names), "DATALOADER__RATIOS": [1.0, 3.0], "SOLVER__MAX_ITER": 6}
    text = report_of(tiny.config("", tmp_path / "out", **sets)).text
    head, first, second = (re.split(r"  +", line) for line in text.splitlines()[1:4])
    at = head.index("epochs")
    assert (first[at], second[at]) == ("3", "18")  # 24 images: 6 of 2, 18 of 1


def test_boxes_and_sizes_are_those_of_the_resized_images(tmp_path):
    cfg = tiny.config(
        write(tmp_path / "set", [[(0, 10, 20, 30, 10)]], size=(100, 50)),
        tmp_path / "out",
        INPUT__MIN_SIZE_TRAIN=[100],
        INPUT__MAX_SIZE_TRAIN=150,
    )
    (dataset,) = training_sets(cfg)
    own = statistics_of(dataset, 100, 150)
    assert own.sizes.tolist() == [[75, 150]] and own.boxes.tolist() == [[15, 30, 60, 45]]
    image, target = dataset[0]
    assert image.shape[1:] == (75, 150) and target["boxes"][0, 1:].tolist() == [30, target["boxes"][0, 2], 45]


def test_a_classifier_and_data_of_others(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    file = tmp_path / "a.npz"
    np.savez(file, images=rng.integers(0, 255, (12, 8, 8), dtype=np.uint8), labels=np.array([0, 1, 1] * 4))
    words = {"MODEL__META_ARCHITECTURE": "Classifier", "MODEL__BACKBONE__NAME": "simplenet_8", "INPUT__CROP_SIZE": 8}
    cfg = tiny.config(str(file), tmp_path, **words, MODEL__RETINANET__NORM="", MODEL__BACKBONE__NORM="BN")
    report = report_of(cfg)
    head, row = (re.split(r"  +", line) for line in report.text.splitlines()[1:3])
    assert head[1:] == ["images", "epochs"] and row[1:] == ["12", "1.33"]
    assert cells(report.text, "1 ")[1:] == ["8", "66.7 %", "0"]
    draw_data(report, tmp_path)
    assert Image.open(tmp_path / "labels.png").size == (900, 500)

    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 8

    report = describe_data(cfg, torch.nn.Linear(1, 1), [Own()], [])
    assert report.text.splitlines()[1:] == ["set  images  epochs", "Own       8       2"]
    assert report.best_ious is None and report.warnings == []


def test_plots(names, tmp_path):
    pytest.importorskip("matplotlib")
    report = report_of(tiny.config(names[0], tmp_path / "out", MODEL__ANCHOR_GENERATOR__SIZES=[8, 16, 32, 64, 128]))
    draw_data(report, tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "labels.png").convert("RGB")).astype(int)
    assert pixels.shape == (750, 1300, 3)
    for color in ((67, 99, 216), (230, 25, 75)):  # bars, anchors
        assert (abs(pixels - color).max(-1) < 8).sum() > 300


def test_a_training_logs_it_and_draws(names, tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib")
    module = sys.modules[train.__module__]
    monkeypatch.setattr(module, "draw_data", draw_data)
    cfg = tiny.config(names[0], tmp_path / "out", SOLVER__MAX_ITER=1, SOLVER__IMS_PER_BATCH=2)
    train(cfg)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "data sets\nset " in log and "WARNING" in log and "nothing of the classes dog" in log
    assert Image.open(tmp_path / "out" / "labels.png").size == (1300, 750)


def test_without_matplotlib_it_is_said(names, tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "domainnorm.visualization.labels"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.INFO, "domainnorm"):
        draw_data(report_of(tiny.config(names[0], tmp_path / "out")), tmp_path)
    assert "pip install matplotlib" in caplog.text and not (tmp_path / "labels.png").exists()
