"""The peers of a study: data as each wants it, predictions scored alike, first steps."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import peer_domainnorm
import peer_torchvision
import peer_ultralytics
import peers
from study_rows import STUDIES


@pytest.fixture
def data(tmp_path):
    """Two laboratories with three images each, 80 pixels wide and 64 high, an object of each of two classes in each."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for split in ("train", "val"):
        for laboratory in peers.LABORATORIES:
            names = [f"{split}_{laboratory}_{k}.png" for k in range(3)]
            for k, name in enumerate(names):
                Image.new("RGB", (80, 64), (40 * k, 90, 90)).save(folder / "images" / name)
            images = [{"id": k, "file_name": name, "width": 80, "height": 64} for k, name in enumerate(names, 1)]
            boxes = [(7, [8, 16, 40, 32]), (9, [60, 10, 10, 20])]
            annotations = [
                {"id": 2 * i["id"] + k, "image_id": i["id"], "category_id": c, "bbox": box, "area": box[2] * box[3]}
                for i in images
                for k, (c, box) in enumerate(boxes)
            ]
            categories = [{"id": 7, "name": "RBC"}, {"id": 9, "name": "WBC"}]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (folder / f"{split}_{laboratory}.json").write_text(json.dumps(content))
    return folder


def test_scores(data):
    """All found: 100; with the classes exchanged: 0."""

    def find(files, labels):
        for file in files:
            assert file.exists()
            yield [[8, 16, 48, 48], [60, 10, 70, 30]], [0.9, 0.8], labels

    found = peers.scores(data, lambda files: find(files, [0, 1]))
    assert [found["population"][name]["bbox"]["AP"] for name in peers.LABORATORIES] == pytest.approx([100, 100])
    assert peers.scores(data, lambda files: find(files, [1, 0]))["population"]["pbc"]["bbox"]["AP"] == 0


def test_the_labels_of_yolo(data, tmp_path):
    file = peer_ultralytics.convert(data, tmp_path / "yolo")
    content = json.loads(file.read_text())
    assert content["names"] == ["RBC", "WBC"]
    folder = Path(content["path"])
    assert sorted(p.name for p in (folder / "images").iterdir()) == [f"train_pbc_{k}.png" for k in range(3)]
    lines = (folder / "labels" / "train_pbc_0.txt").read_text().splitlines()
    assert lines == ["0 0.350000 0.500000 0.500000 0.500000", "1 0.812500 0.312500 0.125000 0.312500"]
    assert (folder / content["val"]).read_text().startswith("./images/train_pbc")


def test_flips(data):
    images = peer_torchvision.Images(data, flips=True)
    found = {tuple(target["boxes"][0].tolist()) for _, target in (images[0] for _ in range(20))}
    assert found == {(8.0, 16.0, 48.0, 48.0), (32.0, 16.0, 72.0, 48.0)}


@pytest.mark.slow
@pytest.mark.parametrize("module", [peer_torchvision, peer_domainnorm])
@pytest.mark.parametrize("plain", [False, True])
def test_first_steps(module, plain, data, tmp_path, monkeypatch):
    arguments = ["--data", str(data), "--steps", "2", "--out", str(tmp_path / "out"), *(["--plain"] if plain else [])]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    monkeypatch.setattr(peers, "SIZE", 64)
    module.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    study = STUDIES["peers"]
    assert study.value("domainnorm", found, "pbc") is not None and study.value("domainnorm", found, "bccd") is not None
    assert found["cpu_seconds"] > 0
