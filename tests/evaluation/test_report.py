"""The report of a run: its page says what the files of the run have, and is all in one file."""

import base64
import html.parser
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import domainnorm as dn
from domainnorm.config import save_config
from domainnorm.evaluation.report import write_report

pytest.importorskip("matplotlib")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Reader(html.parser.HTMLParser):
    """The headings, list items, notes, captions and tables of a page, and where its pictures are."""

    def __init__(self, text):
        super().__init__()
        self.found, self.rows, self.sources = {}, [], []
        self.tag = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self.tag in ("th", "td"):
            self.rows[-1][-1] += data
        elif data.strip():
            self.found.setdefault(self.tag, []).append(data)

    def handle_endtag(self, tag):
        self.tag = ""

    def pictures(self):
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in self.sources]


def scores(value, **classes):
    """Like a result, of which the classes have the AP that is given."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    of_classes = {f"{metric}-{name.replace('_', ' ')}": ap for name, ap in classes.items() for metric in ("AP", "AR")}
    return dict.fromkeys(names, value) | {"APl": None} | of_classes


@pytest.fixture
def run(tmp_path):
    """Files of a run on 4 images: of their 4 objects two are found, one of them also as the other class."""
    data_set = tiny.write_dataset(tmp_path / "set", count=4)
    return make_run(tmp_path / "run <1>", [data_set])


def make_run(out, sets, names=("",), **others):
    cfg = tiny.config(sets[0], out, DATASETS__TEST=sets, TEST__REPORT=True, SOLVER__BASE_LR=0.02, **others)
    results = {}
    for key, ap in (("population", 40.0), ("recomputed", 42.5), ("minibatch", 38.0)):
        of_set = {"bbox": scores(ap, kind_3=ap - 10, kind_7=ap + 10)}
        if cfg.MODEL.MASK_ON:
            of_set["segm"] = scores(ap - 5, kind_3=ap - 15, kind_7=ap + 5)
        results[key] = dict.fromkeys(names, of_set) if len(names) > 1 else of_set
    for entry, name in zip(sets, names, strict=True):
        folder = out / "inference" / "population" / name
        folder.mkdir(parents=True)
        truth = json.loads(Path(entry.rpartition("=")[2].rpartition(":")[0]).read_text())["annotations"]
        found = []
        for entry, score in zip(truth[:2], (0.9, 0.8), strict=True):
            mask = np.zeros((64, 64), np.uint8, order="F")
            x, y, width, height = entry["bbox"]
            mask[y : y + height, x : x + width] = 1
            rle = coco_mask.encode(mask)
            found.append({key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": score})
            if cfg.MODEL.MASK_ON:
                found[-1]["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        found += [found[1] | {"category_id": 3, "score": 0.85}, found[0] | {"bbox": [0, 50, 5, 5], "score": 0.1}]
        (folder / "coco_instances_results.json").write_text(json.dumps(found))
    (out / "results.json").write_text(json.dumps(results))
    lines = [{"iteration": k, "total_loss": 3.0 / k, "loss_cls": 1.0 / k, "lr": 0.1} for k in (20, 40, 60)]
    lines += [{"iteration": k, "population/bbox/AP": ap} for k, ap in ((20, 45.0), (40, 44.0), (60, 40.0))]
    (out / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 6')
    save_config(cfg, out / "config.yaml")
    return cfg


def read(cfg):
    return Reader((Path(cfg.OUTPUT_DIR) / "report.html").read_text(encoding="utf-8"))


def test_findings_come_first_and_are_right(run):
    """Two of four objects are found at 0.8 or more, beside one prediction of another class."""
    write_report(run)
    page = read(run)
    assert page.found["h1"] == ["Report of run <1>"] and page.found["h2"][0] == "Findings"
    assert page.found["li"] == [
        "AP is 40.0 (AP50 40.0, AP75 40.0) under population statistics.",
        "Under recomputed statistics AP is 2.5 points higher: 42.5. The moving averages lag behind: set "
        "TEST.RECOMPUTE.IN_CHECKPOINT True to keep recomputed ones.",
        "Under minibatch statistics AP is 2.0 points lower: 38.0.",
        "The lowest AP of a class: kind 3 30.0; the highest: kind 7 50.0.",
        "Keep predictions that score 0.80 or more: then 67% of them are right, 50% of 4 objects are found, F1 is "
        "0.571.",
        "Most often confused: kind 7 taken for kind 3 (1x).",
        "At that score, objects that are missed: 2; predictions of nothing, or of an object that is found already: 1.",
        "population/bbox/AP was highest at iteration 20, 45.0, and is 40.0 at the end: train for less long, or take "
        "model_best.pth.",
    ]


def test_tables_have_the_numbers_of_the_files(run):
    write_report(run)
    rows = {row[0]: row[1:] for row in read(run).rows}
    assert rows["boxes"][:4] == ["AP", "AP50", "AP75", "APs"] and len(rows["boxes"]) == 12
    assert rows["recomputed"] == ["42.50"] * 5 + ["-"] + ["42.50"] * 6
    assert rows["class"] == [
        *("objects", "best score", "precision", "recall", "F1", "AP population", "AR population"),
        *("AP recomputed", "AR recomputed", "AP minibatch", "AR minibatch"),
    ]
    assert rows["kind 3"] == [
        "2",
        "0.900",
        "1.000",
        "0.500",
        "0.667",
        *(["30.00"] * 2),
        *(["32.50"] * 2),
        *(["28.00"] * 2),
    ]
    assert rows["kind 7"] == [
        "2",
        "0.800",
        "1.000",
        "0.500",
        "0.667",
        *(["50.00"] * 2),
        *(["52.50"] * 2),
        *(["48.00"] * 2),
    ]
    assert rows["SOLVER.BASE_LR"] == ["0.02"] and "SOLVER.MOMENTUM" not in rows


def test_thresholds_stand_beside_the_predictions(run):
    write_report(run)
    file = Path(run.OUTPUT_DIR) / "inference/population/thresholds.json"
    assert json.loads(file.read_text()) == {"bbox": {"all": 0.8, "classes": {"kind 3": 0.9, "kind 7": 0.8}}}


def test_all_pictures_are_in_the_page_and_figures_are_files_too(run):
    write_report(run)
    page, text = read(run), (Path(run.OUTPUT_DIR) / "report.html").read_text()
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"<script|<link|@import|https?://", text)
    figures = ["precision_recall", "f1", "confusion", "training"]
    files = {path.name: path.read_bytes() for path in (Path(run.OUTPUT_DIR) / "report").iterdir()}
    assert set(files) == {f"{name}.png" for name in figures}
    assert all(base64.b64encode(content).decode() in text for content in files.values())
    pictures = page.pictures()
    assert [picture.format for picture in pictures] == ["PNG"] * 3 + ["JPEG"] * 3 + ["PNG"]


def test_the_worst_images_are_drawn_with_what_was_found(run):
    """Image 11 has a missed object and two predictions of which one is wrong; 10 has no mistake."""
    write_report(run)
    page = read(run)
    captions = [text for text in page.found["figcaption"] if "missed" in text and "png" in text]
    assert captions == ["1.png: 0 missed, 1 wrong", "2.png: 1 missed, 0 wrong", "3.png: 1 missed, 0 wrong"]
    for picture in page.pictures()[3:6]:
        assert picture.size == (646, 320)
    halves = [np.asarray(page.pictures()[3].crop((x, 0, x + 320, 320))).astype(int) for x in (0, 326)]
    assert np.abs(halves[0] - halves[1]).max() > 100  # the wrong prediction
    empty = np.asarray(page.pictures()[4].crop((326, 0, 646, 320)))
    assert np.abs(empty[:20, :20].astype(int) - 90).max() < 25  # nothing is drawn there


def test_several_sets_with_names(tmp_path):
    one, other = (tiny.write_dataset(tmp_path / name, count=3) for name in ("a", "b"))
    cfg = make_run(tmp_path / "out", [f"near={one}", f"far={other}"], ("near", "far"))
    write_report(cfg)
    page = read(cfg)
    assert page.found["h2"][1:3] == ["Results on near", "Results on far"]
    assert [sum(f" on {name}" in text for text in page.found["li"]) for name in ("near", "far")] == [7, 7]
    assert {path.name for path in (tmp_path / "out/report").iterdir()} == {
        *(f"{name}_{figure}.png" for name in ("near", "far") for figure in ("precision_recall", "f1", "confusion")),
        "training.png",
    }


def test_masks(tmp_path):
    data_set = tiny.write_dataset(tmp_path / "a", count=4)
    cfg = make_run(tmp_path / "out", [data_set], **tiny.MASK_RCNN)
    write_report(cfg)
    page = read(cfg)
    thresholds = json.loads((tmp_path / "out/inference/population/thresholds.json").read_text())
    assert thresholds["bbox"] == thresholds["segm"]
    assert "AP is 35.0 (AP50 35.0, AP75 35.0) under population statistics of masks." in page.found["li"]
    assert {"Classes", "Classes of masks"} <= set(page.found["h3"])
    assert (tmp_path / "out/report/masks_f1.png").is_file()


def test_a_classifier(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "val.npz", images=images, labels=[0, 0, 1, 2], class_names=["cat", "dog", "bird"])
    options = [
        "MODEL.META_ARCHITECTURE",
        "Classifier",
        "DATASETS.TEST",
        [str(tmp_path / "val.npz")],
        "INPUT.CROP_SIZE",
        8,
    ]
    cfg = dn.load_config(None, [*options, "OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", 0])
    folder = tmp_path / "out/inference/population"
    folder.mkdir(parents=True)
    rows = [(0, 0, 0.1), (0, 1, 2.0), (1, 1, 0.2), (2, 0, 3.0)]
    predictions = [
        {"image_id": k, "file_name": f"val.npz[{k}]", "label": label, "predicted": [found], "loss": loss}
        for k, (label, found, loss) in enumerate(rows)
    ]
    (folder / "classification_results.json").write_text(json.dumps(predictions))
    values = {"top1": 50.0, "top5": 75.0, "loss": 1.3, "top1-cat": 50.0, "top1-dog": 100.0, "top1-bird": 0.0}
    (tmp_path / "out/results.json").write_text(json.dumps({"population": {"classification": values}}))
    write_report(cfg)
    page = read(cfg)
    assert page.found["li"] == [
        "top1 is 50.0 under population statistics.",
        "The lowest top1 of a class: bird 0.0, cat 50.0; the highest: dog 100.0.",
        "Most often confused: cat taken for dog (1x), bird taken for cat (1x).",
    ]
    assert ["cat", "2", "50.00"] in page.rows and ["classes", "top1", "top5", "loss"] in page.rows
    captions = [text for text in page.found["figcaption"] if "loss" in text]
    assert captions[0] == "bird, predicted cat; loss 3.00; val.npz[3]" and len(captions) == 4
    worst = np.asarray(page.pictures()[1])
    np.testing.assert_allclose(worst[10::20, 10::20].astype(int), images[3].astype(int), atol=60)
    assert (tmp_path / "out/report/confusion.png").is_file()


def test_without_matplotlib_a_line_says_what_to_do(run, monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    write_report(run)
    (message,) = caplog.messages
    assert "pip install matplotlib" in message and not (Path(run.OUTPUT_DIR) / "report.html").exists()


def test_a_switch(run):
    run = run.clone()
    run.defrost()
    run.TEST.REPORT = False
    write_report(run)
    assert not (Path(run.OUTPUT_DIR) / "report.html").exists()


@pytest.mark.slow
def test_training_and_evaluation_write_it(tmp_path, monkeypatch):
    """Once, at the end; TensorBoard has pictures and the scores of classes at each evaluation."""
    data_set = tiny.write_dataset(tmp_path / "a", count=6)
    out = tmp_path / "out"
    options = {
        "TEST__REPORT": True,
        "TEST__EVAL_PERIOD": 2,
        "TEST__PICTURES": 2,
        "DATASETS__TEST": [f"small={data_set}"],
    }
    cfg = tiny.config(data_set, out, **options)
    dn.train(cfg)
    assert "Results on small" in read(cfg).found["h2"]
    (log,) = re.findall(r"INFO report: (.*)\n", (out / "log.txt").read_text())
    assert Path(log) == out / "report.html"
    events = EventAccumulator(str(out), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert events.Tags()["images"] == ["predictions/0.png", "predictions/5.png"]
    assert [event.step for event in events.Images("predictions/0.png")] == [2, 4]
    picture = Image.open(io.BytesIO(events.Images("predictions/0.png")[0].encoded_image_string))
    assert picture.size == (646, 320)
    written = json.loads((out / "results.json").read_text())["population"]["bbox"]
    last = events.Scalars("population/bbox/AR-kind 3")
    assert last[-1].value == pytest.approx(written["AR-kind 3"], rel=1e-6) and not math.isnan(written["AR10"])
    (out / "report.html").unlink()
    from domainnorm.cli.train import evaluate_only

    evaluate_only(cfg, resume=True)
    assert (out / "report.html").is_file()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_it_on_a_phone(run, tmp_path):
    """All pictures are decoded, nothing but tables is wider than the screen, and no address is asked for."""
    write_report(run)
    text = (Path(run.OUTPUT_DIR) / "report.html").read_text(encoding="utf-8")
    look = (
        "<script>onload = () => { document.title = JSON.stringify([[...document.images].map(i => i.naturalWidth), "
        "document.documentElement.scrollWidth, innerWidth, document.querySelector('li').innerText, "
        "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length]) }</script>"
    )
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", look + "</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    # a window is never narrower than 500 pixels
    options = ["--window-size=500,900", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    widths, content, window, first, asked = json.loads(html.unescape(title))
    assert len(widths) == 7 and min(widths) > 0 and content <= window <= 500 and asked == 0
    assert first == "AP is 40.0 (AP50 40.0, AP75 40.0) under population statistics."


def test_random_states_are_left_alone(run):
    state = torch.get_rng_state()
    write_report(run)
    assert torch.equal(torch.get_rng_state(), state)
