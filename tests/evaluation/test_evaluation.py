"""AP, and evaluation that depends on the model and the images only."""

import contextlib
import io
import json
import math
import random
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ranks import run_ranks

from domainnorm.config import UserError
from domainnorm.data import CocoDataset
from domainnorm.data import test_loader as make_loader
from domainnorm.distributed import rank, world_size
from domainnorm.evaluation import evaluate, evaluate_coco, predict
from domainnorm.layers import DomainBatchNorm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set", count=7)


@pytest.fixture
def annotations(data_set):
    return data_set.rsplit(":", 1)[0]


def read(annotations):
    return json.loads(Path(annotations).read_text())


def perfect(annotations):
    truth = json.loads(Path(annotations).read_text())["annotations"]
    return [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in truth]


def test_perfect_predictions_have_100(annotations):
    """Also of the object whose id is 0, which pycocotools alone takes for unmatched."""
    scores = evaluate_coco(perfect(annotations), read(annotations))
    overall = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert list(scores) == [*overall, "AP-kind 3", "AR-kind 3", "AP-kind 7", "AR-kind 7"]
    assert scores["AR1"] == scores["AR100"] == scores["ARs"] == scores["AP-kind 3"] == scores["AR-kind 7"] == 100
    assert scores["AP"] == scores["AP50"] == scores["AP75"] == scores["APs"] == pytest.approx(100)
    assert math.isnan(scores["APl"])  # there is no large object


def test_no_predictions_have_0(annotations):
    scores = evaluate_coco([], read(annotations))
    assert scores["AP"] == scores["AP50"] == scores["APs"] == scores["AR100"] == scores["AR-kind 3"] == 0
    assert math.isnan(scores["APl"]) and math.isnan(scores["ARl"])


def test_equals_pycocotools_and_leaves_the_predictions_alone(tmp_path, annotations):
    draw = random.Random(0)
    data = json.loads(Path(annotations).read_text())
    for entry in data["annotations"]:
        entry |= {"id": entry["id"] + 1, "iscrowd": 0}  # what pycocotools itself wants
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(data))
    predictions = []
    for entry in data["annotations"] * 4:
        box = [v + draw.uniform(-4, 4) for v in entry["bbox"]]
        kind = draw.choice(tiny.CATEGORY_IDS)
        predictions.append({"image_id": entry["image_id"], "category_id": kind, "bbox": box, "score": draw.random()})
    before = json.dumps(predictions)
    scores = evaluate_coco(predictions, read(file))
    assert json.dumps(predictions) == before
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        reference = COCOeval(truth, truth.loadRes(predictions), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert 0 < scores["AP"] < 100
    assert list(scores.values())[:4] == [100 * value for value in reference.stats[:4]]


def test_annotations_without_what_pycocotools_needs(annotations):
    data = json.loads(Path(annotations).read_text())
    for entry in data["annotations"]:
        del entry["area"]
    assert evaluate_coco(perfect(annotations), data)["AP"] == pytest.approx(100)


def test_boxes_skipped_in_training_are_not_missed_in_evaluation(tmp_path):
    """Dropped ones are no ground truth, clipped ones are it as clipped; crowds stay."""
    name = tiny.write_dataset(tmp_path)
    file = tmp_path / "annotations.json"
    data = read(file)
    boxes = [entry["bbox"] for entry in data["annotations"]]
    boxes[0][:], boxes[1][:] = [5, 5, 0, 9], [200, 5, 9, 9]
    boxes[2][2:] = [500, 40]
    data["annotations"][3]["iscrowd"] = 1
    file.write_text(json.dumps(data), encoding="utf-8-sig")  # as some editors save it
    dataset = CocoDataset(name, invalid_boxes="skip")
    predictions = [
        {"image_id": r.image_id, "category_id": dataset.category_ids[label], "bbox": [x, y, u - x, v - y], "score": 0.9}
        for r in dataset.records
        for (x, y, u, v), label in zip(r.boxes.tolist(), r.labels, strict=True)
    ]
    truth = dataset.ground_truth()
    assert len(predictions) == len(data["annotations"]) - 3 and len(truth["annotations"]) == len(predictions) + 1
    assert evaluate_coco(predictions, truth)["AP"] == pytest.approx(100)
    assert evaluate_coco(predictions, data)["AP"] < 90


def test_test_sets_have_the_classes_the_model_is_trained_on(data_set, tmp_path):
    other = tiny.write_dataset(tmp_path / "other")
    file = tmp_path / "other" / "annotations.json"
    data = read(file)
    data["categories"].insert(1, {"id": 5, "name": "between"})
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"DATASETS\.TEST: .*'between'.* the model is trained on"):
        evaluate(tiny.config(data_set, tmp_path / "out", DATASETS__TEST=[other]), build())
    with pytest.raises(UserError, match=r"NUM_CLASSES 2 contradicts .*3 categories"):
        evaluate(tiny.config(other, tmp_path / "out", DATASETS__TEST=[other], MODEL__RETINANET__NUM_CLASSES=2), build())


def test_predictions_are_in_coco_format_whatever_the_batches(data_set, tmp_path):
    model = tiny.Regressor().eval()
    results = []
    for batch in (1, 3):
        cfg = tiny.config(data_set, tmp_path, TEST__IMS_PER_BATCH=batch)
        results.append(predict(model, make_loader(cfg, data_set, rank=0, world_size=1), CPU))
    assert results[0] == results[1]
    assert [result["image_id"] for result in results[0]] == list(range(10, 17))
    image, _ = next(iter(make_loader(cfg, data_set, rank=0, world_size=1)))
    x0, y0, x1, y1 = model(image[:1])[0]["boxes"][0].tolist()
    first = results[0][0]
    assert first["category_id"] == tiny.CATEGORY_IDS[0]
    assert first["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], rel=1e-6)


def test_order_of_images_leaves_no_trace(data_set, tmp_path):
    model = tiny.Regressor().eval()
    loader = make_loader(tiny.config(data_set, tmp_path), data_set, rank=0, world_size=1)
    forth = predict(model, loader, CPU)
    loader.batches.reverse()
    assert predict(model, loader, CPU) == forth


def test_a_class_the_data_set_lacks(data_set, tmp_path):
    class Third(tiny.Regressor):
        def forward(self, images, targets=None):
            return [output | {"labels": torch.tensor([2])} for output in super().forward(images)]

    with pytest.raises(UserError, match=r"class 2.*2 categories"):
        predict(Third().eval(), make_loader(tiny.config(data_set, tmp_path), data_set, rank=0, world_size=1), CPU)


def build(seed=0):
    torch.manual_seed(seed)
    model = tiny.Regressor(norm=True)
    model.norm.running_mean += 0.3
    return model


def test_statistics_side_by_side(data_set, tmp_path, capsys):
    cfg = tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set])
    model = build()
    results = evaluate(cfg, model, ["population", "minibatch"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["statistics", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"]
    assert [row[0] for row in table[1:3]] == ["population", "minibatch"] and table[1][6] == "-"
    assert table[3:7] == [[], ["classes"], ["population", "minibatch"], ["class", *(["AP", "AR"] * 2)]]
    for row, name in zip(table[7:], ("kind 3", "kind 7"), strict=True):
        of_class = [results[key]["bbox"][f"{metric}-{name}"] for key in results for metric in ("AP", "AR")]
        assert [" ".join(row[:2]), *row[2:]] == [name, *(f"{value:.2f}" for value in of_class)]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["population"]["bbox"]["APl"] is None and math.isnan(results["population"]["bbox"]["APl"])
    assert stored["population"]["bbox"]["AP"] == results["population"]["bbox"]["AP"] > 0
    files = [tmp_path / "inference" / name / "coco_instances_results.json" for name in results]
    one, other = (json.loads(file.read_text()) for file in files)
    assert len(one) == len(other) == 7 and one != other
    assert list(results) == ["population", "minibatch"]
    assert list(evaluate(cfg, model)) == ["population"]  # of the config
    assert list(evaluate(cfg, model, "minibatch")) == ["minibatch"]


def test_several_test_sets_are_one_level_more(data_set, tmp_path):
    other = tiny.write_dataset(tmp_path / "other", count=2)
    results = evaluate(tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set, other]), build())
    assert list(results["population"]) == [data_set, other]
    assert "AP" in results["population"][other]["bbox"]
    assert len(list((tmp_path / "inference" / "population").glob("*/coco_instances_results.json"))) == 2


def test_the_model_is_left_as_it_was(data_set, tmp_path, monkeypatch):
    cfg = tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set], TEST__STATISTICS=["minibatch"])
    model = build()
    model.linear.eval()
    model.norm.statistics = "population"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    draws = torch.get_rng_state()
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(model.linear, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            evaluate(cfg, model)
        assert model.training and model.norm.training and not model.linear.training
        assert model.norm.statistics == "population"
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), draws)


def test_mistakes(data_set, tmp_path):
    with pytest.raises(UserError, match=r"DATASETS\.TEST is empty"):
        evaluate(tiny.config(data_set, tmp_path), build())
    with pytest.raises(UserError, match="'batch'"):
        evaluate(tiny.config(data_set, tmp_path, DATASETS__TEST=[data_set]), build(), "batch")


def _evaluate_on_ranks(_, cfg):
    model = build()
    model.norm.num_batches_tracked += 1
    if world_size() == 1:  # the union of what two ranks have seen
        model.norm.running_mean += 0.5
        model.norm.running_var += 0.25
    else:  # training leaves every rank its own
        model.norm.running_mean += rank()
    own = [buffer.clone() for buffer in model.buffers()]
    results = evaluate(cfg, model)
    assert results["population"]["bbox"]["AP"] >= 0
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), own, strict=True))


def test_ranks_evaluate_their_merged_statistics_and_leave_no_trace(data_set, tmp_path):
    files = []
    for processes in (1, 2):
        cfg = tiny.config(data_set, tmp_path / str(processes), DATASETS__TEST=[data_set])
        run_ranks(_evaluate_on_ranks, processes, cfg)
        files.append(tmp_path / str(processes) / "inference" / "population" / "coco_instances_results.json")
    assert files[0].read_text() == files[1].read_text()


def test_a_detector_sees_one_image_at_a_time(data_set, tmp_path):
    """Minibatch statistics too: the predictions for an image do not depend on its company."""
    from domainnorm.modeling import build_model

    texts = []
    for batch in (1, 3):
        cfg = tiny.config(
            data_set,
            tmp_path / str(batch),
            DATASETS__TEST=[data_set],
            TEST__IMS_PER_BATCH=batch,
            TEST__STATISTICS=["minibatch"],
        )
        torch.manual_seed(0)
        model = build_model(cfg)
        assert any(isinstance(module, DomainBatchNorm) for module in model.modules())
        evaluate(cfg, model)
        file = tmp_path / str(batch) / "inference" / "minibatch" / "coco_instances_results.json"
        texts.append(file.read_text())
    assert texts[0] == texts[1] and len(texts[0]) > 1000


@pytest.mark.parametrize(("count", "kept", "ap"), [(200, 100, 50), (200, 200, 100), (80, 50, 100)])
def test_as_many_detections_count_as_a_model_may_give(count, kept, ap):
    """Of 200 objects in one image a perfect detector finds all; 100 at least count, as COCO says."""
    boxes = [[12 * (k % 20), 12 * (k // 20), 10, 10] for k in range(count)]
    truth = {
        "images": [{"id": 1, "height": 300, "width": 300}],
        "annotations": [{"id": k, "image_id": 1, "category_id": 1, "bbox": box} for k, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": "cell"}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 1 - k / 999} for k, box in enumerate(boxes)]
    assert evaluate_coco(found, truth, max_detections=kept)["AP50"] == pytest.approx(ap, abs=1)


def test_the_number_of_detections_of_the_config_counts(tmp_path, caplog):
    """Through the config, where a model finds 144 objects in one image."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "0.png")
    boxes = [[5.0 * (k % 12), 5.0 * (k // 12), 4.0, 4.0] for k in range(144)]
    data = {
        "images": [{"id": 1, "file_name": "0.png", "height": 64, "width": 64}],
        "annotations": [{"id": k, "image_id": 1, "category_id": 1, "bbox": box} for k, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))

    class Oracle(torch.nn.Module):
        def forward(self, images):
            found = torch.tensor(boxes)
            found[:, 2:] += found[:, :2]
            return [{"boxes": found, "labels": torch.zeros(144, dtype=torch.int64), "scores": torch.ones(144)}]

    name = f"{tmp_path / 'a.json'}:{tmp_path / 'images'}"
    for count, low, high in ((100, 60, 75), (144, 99.99, 100.01)):
        cfg = tiny.config(name, tmp_path / "out", DATASETS__TEST=[name], TEST__DETECTIONS_PER_IMAGE=count)
        with caplog.at_level("INFO", logger="domainnorm"):
            assert low < evaluate(cfg, Oracle())["population"]["bbox"]["AP"] < high
    assert "AP counts the 144 best detections of an image" in caplog.text
