"""`domainnorm predict`: what it prints and writes, and what a mistake or a broken image does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

import domainnorm as dn
from domainnorm.cli import main as domainnorm
from domainnorm.cli import predict as command
from domainnorm.engine.checkpoint import save_model

TOOL = Path(__file__).parents[2] / "tools" / "predict.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    tiny.write_dataset(folder, count=3)
    return folder / "images"


@pytest.fixture(scope="module")
def weights(images, tmp_path_factory):
    """Of a Mask R-CNN that finds something anywhere."""
    folder = tmp_path_factory.mktemp("run")
    chosen = tiny.MASK_RCNN | {"MODEL__ROI_HEADS__NUM_CLASSES": 2, "MODEL__CLASS_NAMES": ["kind 3", "kind 7"]}
    cfg = tiny.config("gone.json:gone", folder, **chosen)
    save_model(cfg, "net.pth", dn.build_model(cfg))
    return folder / "net.pth"


def run(weights, out, inputs, *words):
    given = ["predict", "--weights", weights, "--out", out, "--input", *inputs, "--score", 0.2, *words]
    return domainnorm([str(word) for word in given])


def test_pictures_lines_and_one_file(weights, images, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run(weights, out, [images]) == 0
    printed, errors = capsys.readouterr()
    lines = printed.splitlines()
    assert errors == "" and len(lines) == 4
    content = json.loads((out / "predictions.json").read_text())
    found = dn.Predictor(weights, score=0.2)(images)
    for number, (line, one) in enumerate(zip(lines, found, strict=False), start=1):
        assert line.rpartition(",")[0] == str(one).rpartition(",")[0] and line.endswith(" ms")
        assert line.startswith(f"{images / str(number - 1)}.png: ")
        own = [result for result in content if result["image_id"] == number]
        assert own == one.coco_results(number) and len(own) > 0
        assert {result["file_name"] for result in own} == {str(images / f"{number - 1}.png")}
        assert all(result["segmentation"]["size"] == [64, 64] for result in own)
    assert lines[-1] == f"{out / 'predictions.json'}: {len(content)} predictions in 3 images"
    pictures = sorted((out / "pictures").iterdir())
    assert [file.name for file in pictures] == ["0.jpg", "1.jpg", "2.jpg"]
    drawn = torch.frombuffer(bytearray(Image.open(pictures[0]).tobytes()), dtype=torch.uint8).view(64, 64, 3)
    assert (drawn.permute(2, 0, 1).float() - found[0].draw()).abs().mean() < 20  # but for JPEG
    assert sorted(file.name for file in out.iterdir()) == ["pictures", "predictions.json"]


def test_what_is_broken_is_a_line(weights, images, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    inputs = [tmp_path / "broken.jpg", images / "0.png", tmp_path / "absent.jpg", images / "1.png"]
    assert run(weights, tmp_path / "out", inputs) == 2
    printed, errors = capsys.readouterr()
    lines = errors.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: image ") for line in lines)
    assert "broken.jpg: cannot be read" in lines[0] and "absent.jpg: no such file or folder" in lines[1]
    assert [Path(line.split(":")[0]).name for line in printed.splitlines()] == ["0.png", "1.png", "predictions.json"]
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert run(weights, tmp_path / "nothing", inputs[:1]) == 2
    assert list((tmp_path / "nothing").iterdir()) == []


def test_images_of_one_name_have_pictures_of_their_own(weights, images, tmp_path):
    (tmp_path / "other").mkdir()
    Image.open(images / "0.png").save(tmp_path / "other" / "0.png")
    assert run(weights, tmp_path / "out", [images / "0.png", tmp_path / "other", images / "0.png"]) == 0
    pictures = sorted(file.name for file in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["0.jpg", "0_2.jpg", "0_3.jpg"]


def test_the_images_are_not_overwritten(weights, tmp_path, images):
    Image.open(images / "0.png").convert("RGB").save(tmp_path / "0.jpg")
    before = (tmp_path / "0.jpg").read_bytes()
    assert run(weights, tmp_path, [tmp_path]) == 0
    assert (tmp_path / "0.jpg").read_bytes() == before


def test_options_reach_the_predictor(weights, images, tmp_path, monkeypatch):
    given = {}

    class Spy(dn.Predictor):
        def __init__(self, *args, **options):
            given.update(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(command, "Predictor", Spy)
    words = ["--statistics", "minibatch", "--batch-size", 2, "--exact", "--opts", "INPUT.MIN_SIZE_TEST", 48]
    assert run(weights, tmp_path / "out", [images], *words) == 0
    options = ["INPUT.MIN_SIZE_TEST", "48"]
    assert given == {
        **{"statistics": "minibatch", "domain": None, "score": 0.2, "batch_size": 2, "exact": True},
        **{"config_file": None, "options": options},
    }


def test_the_best_score_of_each_class(weights, images, tmp_path):
    """From the file of a run, that has the boxes' first; one that no prediction reached is null."""
    best = {"bbox": {"all": 0.4, "classes": {"kind 3": 0.2, "kind 7": None}}, "segm": {"all": 0.4, "classes": {}}}
    (tmp_path / "thresholds.json").write_text(json.dumps(best))
    assert run(weights, tmp_path / "out", [images], "--score", tmp_path / "thresholds.json") == 0
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    found = dn.Predictor(weights, score={"kind 3": 0.2})(images)
    assert content == [entry for k, one in enumerate(found, start=1) for entry in one.coco_results(k)] and content


def test_mistakes(weights, images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--score", "2"], "score takes a number from 0 to 1, got 2"),
        (["--score", "gone.json"], "--score takes a number from 0 to 1 or a run's thresholds.json, got 'gone.json'"),
        (["--score", tmp_path / "file"], "or a run's thresholds.json, got"),
        (["--statistics", "recomputed"], "invalid choice: 'recomputed'"),
        (["--weights", tmp_path], "holds no checkpoint"),
        (["--domain", "day"], "the model has no norm with several domains"),
        (["--out", tmp_path / "file"], f"--out {str(tmp_path / 'file')!r}: cannot be made"),
    ):
        assert run(weights, tmp_path / "out", [images], *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_tool_is_the_same_command(weights, images, tmp_path):
    words = [TOOL, "--weights", weights, "--input", f"{images}/*.png", "--out", tmp_path / "out", "--score", "0.2"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4 and (tmp_path / "out" / "predictions.json").is_file()
