"""Pictures of data: what the files say, what the loader gives, as a contact sheet or a page."""

import base64
import io
import json
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from domainnorm.cli import main
from domainnorm.cli import show as show_module
from domainnorm.config import load_config
from domainnorm.data import train_loader
from domainnorm.visualization import samples
from domainnorm.visualization.draw import color_of
from domainnorm.visualization.samples import annotated, loaded
from domainnorm.visualization.sheet import Group, as_uint8, contact_sheet, enlarged, page


@pytest.fixture
def data_set(tmp_path):
    """The second image has a crowd, and a box outside of it."""
    name = tiny.write_dataset(tmp_path / "set", count=3)
    file = tmp_path / "set" / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"] += [
        {"id": 50, "image_id": 11, "category_id": 3, "bbox": [40, 2, 20, 20], "iscrowd": 1},
        {"id": 51, "image_id": 11, "category_id": 7, "bbox": [90, 2, 20, 20]},
    ]
    file.write_text(json.dumps(content))
    return name


def plain(red, height=20, width=30):
    return torch.tensor([red, 10, 20], dtype=torch.uint8)[:, None, None].expand(3, height, width)


def test_a_contact_sheet_has_all_pictures_and_nothing_over_them():
    groups = [
        Group("one", [plain(k, 20 + k, 40 + 5 * k) for k in range(1, 8)], ["caption"] * 7),
        Group("two", [plain(100)], ["a word that is far too long for its picture: " + 60 * "x"]),
    ]
    sheet = contact_sheet(groups)
    for k in range(1, 8):
        assert (sheet == torch.tensor([k, 10, 20]).view(3, 1, 1)).all(0).sum() == (20 + k) * (40 + 5 * k)
    assert (sheet == torch.tensor([100, 10, 20]).view(3, 1, 1)).all(0).sum() == 600
    assert (sheet[:, -4:] == 255).all() and (sheet[:, :, -4:] == 255).all()


def test_a_page_holds_its_pictures():
    text = page("a < b", [Group("set & more", [plain(9), plain(200)], ["<first>\n2 cats", "second"])])
    assert "<title>a &lt; b</title>" in text and "<h2>set &amp; more</h2>" in text and "&lt;first&gt;\n2 cats" in text
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', text)
    for red, data in zip((9, 200), found, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        assert abs(pixels - [red, 10, 20]).max() <= 3
    assert "http" not in text


def test_small_images_grow_by_whole_factors_and_large_ones_shrink():
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    grown, factor = enlarged(image, 7, 100)
    assert factor == 4 and grown.shape == (3, 8, 8) and (grown[:, :4, 4:] == image[:, :1, 1:]).all()
    shrunk, factor = enlarged(plain(5, 300, 200), 50, 150)
    assert factor == 0.5 and shrunk.shape == (3, 150, 100)
    assert as_uint8(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 127, 255]


def test_the_file_is_shown_with_what_training_leaves_out(data_set, monkeypatch):
    drawn = []
    real = samples.draw_objects

    def watch(image, boxes, names, **options):
        drawn.append((boxes, list(names), options))
        return real(image, boxes, names, **options)

    monkeypatch.setattr(samples, "draw_objects", watch)
    cfg = load_config(None, ["DATASETS.TRAIN", [data_set], "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
    (group,) = annotated(cfg, 5)
    expected = "3 images, 5 objects of 2 classes: "
    assert expected in group.title and group.title.endswith("; 3 are drawn"), group.title
    assert [caption.splitlines()[0] for caption in group.captions] == ["0.png", "1.png", "2.png"]
    assert group.captions[0] == "0.png\n64 x 64 pixels\n1 kind 3"
    boxes, names, options = drawn[1]
    assert names == ["kind 7", "kind 3 (crowd)", "kind 7 (invalid)"] and options["classes"] == ["kind 3", "kind 7"]
    assert boxes[:2].tolist() == [[35, 35, 140, 140], [200, 10, 300, 110]]  # 5 times as large
    assert group.pictures[1].shape == (3, 320, 320)
    assert group.pictures[1][:, 90, 35].tolist() == list(color_of("kind 7", ["kind 3", "kind 7"]))


def test_masks_of_the_file(data_set):
    words = ["DATASETS.TRAIN", [data_set], "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True]
    (group,) = annotated(load_config(None, words), 5)
    tint = 0.65 * torch.tensor([250, 40, 40]) + 0.35 * torch.tensor(color_of("kind 7", ["kind 3", "kind 7"]))
    assert (group.pictures[1][:, 100, 100] - tint).abs().max() <= 1


def test_the_loaders_pictures_are_the_batches_of_training(data_set, tmp_path):
    cfg = tiny.config(
        data_set, tmp_path / "out", SOLVER__IMS_PER_BATCH=2, DATALOADER__INVALID_BOXES="skip", SOLVER__VIRTUAL_BATCH=1
    )
    groups = loaded(cfg, 5)
    assert [group.title for group in groups] == ["iteration 1", "iteration 2"]
    assert [len(group.pictures) for group in groups] == [3, 2]
    batches = train_loader(cfg, rank=0, world_size=1)
    for group in groups:
        images, targets = next(batches)
        for picture, caption, image, target in zip(group.pictures, group.captions, images, targets, strict=False):
            lines = caption.splitlines()
            assert lines[:2] == [target["file_name"], f"{image.shape[2]} x {image.shape[1]} pixels"]
            inside = (target["boxes"][0, :2] + 5).long()
            assert (picture[:, 5 * inside[1], 5 * inside[0]] / 255 - image[:, inside[1], inside[0]]).abs().max() < 0.01
    assert [caption.endswith("a virtual image") for caption in groups[0].captions] == [False, False, True]


@pytest.mark.parametrize("source", ["annotations", "loader"])
@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_the_tool_with_a_classifier(tmp_path, capsys, source, suffix):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (40, 30), (9, 9, 200)).save(tmp_path / "set" / name / f"{k}.png")
    file = tmp_path / "out" / f"sheet{suffix}"
    (tmp_path / "a.yaml").write_text("MODEL: {META_ARCHITECTURE: Classifier}\nINPUT: {CROP_SIZE: 16}\n")
    words = ["DATASETS.TRAIN", f"[{tmp_path / 'set'}]", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"]
    words = [*words, "--config-file", str(tmp_path / "a.yaml"), "--source", source, "--number", "4"]
    assert main(["show", *words, "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: 4 images\n"
    if suffix == ".png":
        assert min(Image.open(file).size) > 150
    else:
        text = file.read_text()
        assert text.count("<img") == 4 and re.search(r"cat/\d\.png|dog/\d\.png", text)
        assert ("16 x 16 pixels" if source == "loader" else "40 x 30 pixels") in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out", "a.jpg"], "--out a.jpg: expected a name that ends in .png or .html"),
        (["--out", "a.png", "DATASETS.TRAIN", "[]"], "DATASETS.TRAIN is empty"),
        (["--out", "a.png", "--number", "0"], "--number takes 1 or more, got 0"),
        (["--out", "a.png", "DATASETS.TRAIN", "[nowhere.json:images]"], "nowhere.json"),
    ],
)
def test_mistakes_are_one_line(words, expected, capsys):
    assert show_module.main(["--config-file", "quickstart.yaml", "--source", "loader", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
