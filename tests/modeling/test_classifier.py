"""Classifiers from config to results.json."""

import copy
import importlib
import json
import math
import re

import numpy as np
import pytest
import tiny
import torch
import torchvision
from ranks import run_ranks
from torch import nn
from torchvision import tv_tensors

import domainnorm as dn
from domainnorm.data import train_loader
from domainnorm.data.classification_sets import minibatch_size, minibatches
from domainnorm.data.patches import patches_file
from domainnorm.data.transforms import classifier_train_transforms
from domainnorm.evaluation.classification import accuracy
from domainnorm.layers import DomainBatchNorm

train_module = importlib.import_module("domainnorm.engine.train")
STATISTICS = ["population", "recomputed", "minibatch"]
CLASSES = ("disk", "square", "triangle", "ring")


@pytest.fixture(scope="module")
def sets(_own_cache):
    return [str(patches_file(name, count)) for name, count in (("patches_train", 48), ("patches_val", 20))]


def options(sets, output, **others):
    chosen = {
        "OUTPUT_DIR": str(output),
        "MODEL.META_ARCHITECTURE": "Classifier",
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "cifar_resnet8",
        "MODEL.BACKBONE.NORM": "BN",
        "MODEL.NORM.GHOSTBN.SAMPLES_PER_GROUP": 4,
        "INPUT.CROP": "padded",
        "INPUT.CROP_SIZE": 32,
        "DATASETS.TRAIN": sets[:1],
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.BASE_LR": 0.05,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.IMS_PER_BATCH": 7,
        "TEST.RECOMPUTE.NUM_SAMPLES": 16,
        "TEST.REPORT": False,
    }
    chosen |= {key.replace("__", "."): value for key, value in others.items()}
    return [word for pair in chosen.items() for word in pair]


def config(sets, output, **others):
    return dn.load_config(None, options(sets, output, **others))


def weights_of(file):
    return torch.load(file, weights_only=True)["model"]


def classifier(sets, tmp_path, **others):
    torch.manual_seed(0)
    return dn.build_model(config(sets, tmp_path, **others))


def patches(sets, count=6):
    archive = np.load(sets[0])
    images = torch.from_numpy(archive["images"][:count]).permute(0, 3, 1, 2) / 255
    return list(images), [{"labels": torch.tensor(label)} for label in archive["labels"][:count]]


# ---- training and its results --------------------------------------------------------------------------------------


def test_training_writes_the_output_folder(sets, tmp_path):
    cfg = config(sets, tmp_path, DATASETS__TEST=sets[1:], TEST__STATISTICS=STATISTICS, TEST__EVAL_PERIOD=3)
    model = dn.train(cfg)
    assert model.training
    names = {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name}
    assert names == {
        *("config.yaml", "log.txt", "metrics.json", "results.json", "inference", "last_checkpoint"),
        *("model_0000002.pth", "model_0000003.pth", "model_best.pth", "model_final.pth"),
    }
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == STATISTICS
    for name, scores in results.items():
        predictions = json.loads((tmp_path / "inference" / name / "classification_results.json").read_text())
        assert scores == {"classification": pytest.approx(slow_accuracy(cfg, predictions))}
    assert results["population"] != results["minibatch"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [3, 4, 4] and lines[1]["loss_cls"] == lines[1]["total_loss"]
    assert (
        "population/classification/top1" in lines[0] and "normalization batches" in (tmp_path / "log.txt").read_text()
    )
    for name, value in weights_of(tmp_path / "model_final.pth").items():
        assert torch.equal(value, model.state_dict()[name])


def slow_accuracy(cfg, predictions):
    """From what the files say of each image, labels read anew."""
    truth = np.load(cfg.DATASETS.TEST[0])["labels"]
    assert [p["image_id"] for p in predictions] == list(range(len(truth)))
    top1 = top5 = 0
    for p, label in zip(predictions, truth, strict=True):
        assert p["label"] == label and sorted(p["predicted"]) == [0, 1, 2, 3]
        top1 += p["predicted"][0] == label
        top5 += label in p["predicted"][:5]
    loss = math.fsum(p["loss"] for p in predictions)
    found = {name: value / len(truth) for name, value in (("top1", 100 * top1), ("top5", 100 * top5), ("loss", loss))}
    for label in range(4):
        own = [p["predicted"][0] == label for p in predictions if p["label"] == label]
        found[f"top1-{CLASSES[label]}"] = 100 * sum(own) / len(own)
    return found


def test_predictions_against_the_model_itself(sets, tmp_path):
    """One image at a time, through the body alone."""
    cfg = config(sets, tmp_path, DATASETS__TEST=sets[1:])
    model = classifier(sets, tmp_path)
    model(*patches(sets))
    results = dn.evaluate(cfg, model)
    assert model.training
    written = json.loads((tmp_path / "inference/population/classification_results.json").read_text())
    archive, right, losses = np.load(sets[1]), np.zeros(4), []
    model.eval()
    for k, label in enumerate(archive["labels"]):
        image = torch.from_numpy(archive["images"][k]).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
        with torch.no_grad():
            logits = model.body(((image - mean) / std)[None])[0]
        right[label] += int(logits.argmax()) == label
        losses.append(float(logits.logsumexp(0) - logits[label]))
        assert written[k]["predicted"] == logits.argsort(descending=True).tolist()
        assert written[k]["loss"] == pytest.approx(losses[-1], abs=1e-5)
    loss = pytest.approx(np.mean(losses), abs=1e-5)
    expected = {"top1": 100 * right.sum() / len(losses), "top5": 100.0, "loss": loss}
    for label, number in enumerate(np.bincount(archive["labels"])):
        expected[f"top1-{CLASSES[label]}"] = 100 * right[label] / number
    assert results == {"population": {"classification": expected}}


def test_accuracy_by_hand():
    """Six classes: the fifth likeliest counts in top5, the sixth, which is not listed, does not."""
    rows = [(0, [0, 1, 2, 3, 4]), (4, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (2, [2, 5, 0, 1, 3])]
    predictions = [{"label": label, "predicted": p, "loss": 0.5 * k} for k, (label, p) in enumerate(rows)]
    scores = accuracy(predictions, "abcdef")
    assert math.isnan(scores.pop("top1-b")) and math.isnan(scores.pop("top1-d"))  # there is none
    of_classes = {"top1-a": 100.0, "top1-c": 100.0, "top1-e": 0.0, "top1-f": 0.0}
    assert scores == {"top1": 50.0, "top5": 75.0, "loss": 0.75} | of_classes


@pytest.mark.parametrize("norm", ["BN", "BRN", "BGN"])
def test_a_resumed_run_equals_one_that_was_not_stopped(sets, tmp_path, norm):
    choices = {"MODEL__BACKBONE__NORM": norm, "SOLVER__WEIGHT_DECAY_NORM": 0.1, "SOLVER__WEIGHT_DECAY_NORM_TARGET": 1}
    choices |= {"DATALOADER__BATCHES": "few_classes", "DATALOADER__CLASSES_PER_BATCH": 2}
    whole = dn.train(config(sets, tmp_path / "whole", **choices))
    cfg = config(sets, tmp_path / "stopped", **choices)
    dn.train(cfg)
    (tmp_path / "stopped/model_final.pth").unlink()
    (tmp_path / "stopped/last_checkpoint").write_text("model_0000002.pth")
    resumed = dn.train(cfg, resume=True)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(("norm", "optimizer"), [("GN", "SGD"), ("GN", "AdamW"), ("SyncBN", "SGD"), ("", "SGD")])
def test_two_processes_take_the_step_of_one(sets, tmp_path, norm, optimizer):
    choices = {"MODEL__BACKBONE__NORM": norm, "SOLVER__MAX_ITER": 3, "DATASETS__TEST": sets[1:]}
    choices |= {"SOLVER__OPTIMIZER": optimizer, "SOLVER__BASE_LR": 0.02 if optimizer == "SGD" else 1e-3}
    choices |= {"SOLVER__WEIGHT_DECAY_NORM": 0.1, "SOLVER__WEIGHT_DECAY_NORM_TARGET": 1}
    run_in_double(0, config(sets, tmp_path / "1", **choices))
    run_ranks(run_in_double, 2, config(sets, tmp_path / "2", **choices))
    one, two = (weights_of(tmp_path / n / "model_final.pth") for n in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    one, two = (json.loads((tmp_path / n / "results.json").read_text())["population"]["classification"] for n in "12")
    assert one == pytest.approx(two, rel=1e-6)


def run_in_double(rank, cfg):
    build = train_module.build_model
    train_module.build_model = lambda cfg: Double(build(cfg))
    try:
        dn.train(cfg)
    finally:
        train_module.build_model = build


class Double(nn.Module):
    """The classifier in float64; its images come in float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model.double()

    def forward(self, images, targets=None):
        return self.model([image.double() for image in images], targets)


@pytest.mark.parametrize(
    ("batches", "classes"), [("iid", 0), ("few_classes", 2), ("few_classes_in_rounds", 2), ("class_disjoint_halves", 0)]
)
def test_what_batches_are_made_of(sets, tmp_path, batches, classes):
    choices = {"DATALOADER__BATCHES": batches, "DATALOADER__CLASSES_PER_BATCH": classes, "MODEL__BACKBONE__NORM": "GN"}
    choices["DATALOADER__CLASSES_WITH_REPLACEMENT"] = False
    cfg = config(sets, tmp_path, **choices)
    assert dn.train(cfg).training
    seen = []
    for _, (_, targets) in zip(range(8), train_loader(cfg, rank=0, world_size=1), strict=False):
        seen.append([int(t["labels"]) for t in targets])
    if classes:
        assert all(sorted(map(row.count, set(row))) == [4, 4] for row in seen)
    elif batches == "iid":
        assert max(len(set(row)) for row in seen) > 2
    else:
        assert all(not set(row[:4]) & set(row[4:]) for row in seen)
    if batches == "few_classes_in_rounds":
        assert all(row[i] != row[i + 1] for row in seen for i in range(0, 8, 2))


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["", "GhostBN"])
@pytest.mark.parametrize(
    "name", ["resnet18", "cifar_resnet8", "cifar_resnet18", "mobilenet_v3_small", "timm/resnet10t", "timm/regnetx_002"]
)
def test_backbones(sets, tmp_path, name, norm):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = classifier(sets, tmp_path, MODEL__BACKBONE__NAME=name, MODEL__BACKBONE__NORM=norm)
    kinds = {type(m) for m in model.modules() if isinstance(m, (DomainBatchNorm, nn.modules.batchnorm._BatchNorm))}
    assert kinds == ({dn.GhostBatchNorm} if norm else set())
    images, targets = patches(sets)
    losses = model(images, targets)
    losses["loss_cls"].backward()
    assert losses.keys() == {"loss_cls"} and losses["loss_cls"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        logits = model.eval()(images)
    assert logits.shape == (6, 4) and logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "norms", "parameters"),
    [
        ("cifar_wide_resnet10_2", 7, 303_000),
        ("cifar_wide_resnet28_10", 25, 36_500_000),
        ("simplenet_512_300", 2, 680_000),
    ],
)
def test_networks_of_the_papers(sets, tmp_path, name, norms, parameters):
    """Of the depth and about the size that their papers say."""
    model = classifier(sets, tmp_path, MODEL__BACKBONE__NAME=name, MODEL__BACKBONE__NORM="GhostBN")
    assert sum(isinstance(m, dn.GhostBatchNorm) for m in model.modules()) == norms
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    if name != "cifar_wide_resnet28_10":
        images, targets = patches(sets)
        model(images, targets)["loss_cls"].backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar_wide_resnet28", "expected cifar_wide_resnetDEPTH_WIDTH"),
        ("cifar_wide_resnet11_2", r"takes a depth of 6n \+ 4"),
        ("simplenet_a", "expected widths of linear layers"),
    ],
)
def test_networks_that_there_are_not(sets, tmp_path, name, message):
    with pytest.raises(dn.UserError, match=message):
        classifier(sets, tmp_path, MODEL__BACKBONE__NAME=name)


def test_the_loss_is_the_cross_entropy_of_normalized_images(sets, tmp_path):
    model = classifier(sets, tmp_path, MODEL__BACKBONE__NORM="GN", MODEL__PIXEL_MEAN=[0.1, 0.2, 0.3])
    images, targets = patches(sets)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225]))
    x = (torch.stack(images) - mean) / std
    logits, labels = model.body(x), [int(t["labels"]) for t in targets]
    expected = sum(row.logsumexp(0) - row[label] for row, label in zip(logits, labels, strict=True)) / len(labels)
    torch.testing.assert_close(model(images, targets)["loss_cls"], expected)
    with pytest.raises(ValueError, match="takes targets"):
        model(images)


def test_label_smoothing(sets, tmp_path):
    model = classifier(sets, tmp_path, MODEL__BACKBONE__NORM="GN", MODEL__CLASSIFIER__LABEL_SMOOTHING=0.2)
    images, targets = patches(sets)
    logits = model.eval()(images)
    goals = torch.full_like(logits, 0.2 / 4)
    goals[range(len(targets)), [int(t["labels"]) for t in targets]] += 0.8
    expected = -(goals * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model.train()(images, targets)["loss_cls"], expected)


def test_cutout(sets, tmp_path):
    cfg = config(sets, tmp_path, INPUT__CUTOUT=8, INPUT__CROP="none", INPUT__RANDOM_FLIP=0.0)
    transform = classifier_train_transforms(cfg)
    image, color = torch.full((3, 32, 32), 255, dtype=torch.uint8), torch.tensor(cfg.MODEL.PIXEL_MEAN)
    areas, places = [], torch.zeros(32, 32)
    for _ in range(400):
        out = transform(tv_tensors.Image(image))
        cut = (out != 1).all(0)
        assert torch.equal(out[:, cut], color[:, None].expand(3, int(cut.sum())))
        rows, columns = cut.any(1), cut.any(0)
        assert int(cut.sum()) == int(rows.sum()) * int(columns.sum())
        areas.append(int(cut.sum()))
        places += cut
    assert max(areas) == 64 and min(areas) >= 16 and (places > 0).all()


@pytest.mark.parametrize("norm", ["BN", "GhostBN", "SeqNorm", "BGN", "GBGN", "BRN"])
def test_a_prediction_depends_on_its_own_image_only(sets, tmp_path, norm):
    model = classifier(sets, tmp_path, MODEL__BACKBONE__NORM=norm, MODEL__NORM__SEQNORM__NUM_SAMPLE_GROUPS=2)
    images, targets = patches(sets)
    model(images, targets)
    model.eval()
    for statistics, tolerance in (("minibatch", 0), ("population", 1e-5)):
        dn.set_statistics(model, statistics)
        with torch.no_grad():
            together, backwards = model(images), model(images[::-1]).flip(0)
            alone = torch.cat([model([image]) for image in images])
        torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(backwards, alone, rtol=tolerance, atol=tolerance)


def test_evaluation_does_not_depend_on_how_images_are_loaded(sets, tmp_path):
    model, found = classifier(sets, tmp_path), []
    for size in (1, 20):
        choices = {"TEST__IMS_PER_BATCH": size, "TEST__STATISTICS": STATISTICS, "DATASETS__TEST": sets[1:]}
        found.append(dn.evaluate(config(sets, tmp_path / str(size), **choices), model))
    assert found[0] == {
        k: {"classification": pytest.approx(v["classification"], rel=1e-5)} for k, v in found[1].items()
    }


# ---- minibatches in inference --------------------------------------------------------------------------------------


def by_hand(cfg, model, file, batches):
    """The logits of the images of an archive, batch by batch, under the minibatch's statistics."""
    archive = np.load(file)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    images = (torch.from_numpy(archive["images"]).permute(0, 3, 1, 2) / 255 - mean) / std
    twin = dn.set_statistics(copy.deepcopy(model).eval(), "minibatch")
    with torch.no_grad():
        return {i: row for batch in batches for i, row in zip(batch, twin.body(images[batch]), strict=True)}


@pytest.mark.parametrize("norm", ["BN", "GhostBN", "BRN"])
@pytest.mark.parametrize(("size", "sizes"), [(0, [7, 7, 6]), (5, [5] * 4), (1, [1] * 20), (100, [20])])
def test_minibatches_are_of_trainings_size_and_in_random_order(sets, tmp_path, norm, size, sizes):
    choices = {"TEST__STATISTICS": ["minibatch"], "TEST__MINIBATCH_SIZE": size, "MODEL__BACKBONE__NORM": norm}
    cfg = config(sets, tmp_path, DATASETS__TEST=sets[1:], **choices)
    model = classifier(sets, tmp_path, MODEL__BACKBONE__NORM=norm)
    model(*patches(sets, 16))
    dn.evaluate(cfg, model)
    batches = minibatches(cfg, np.load(sets[1])["labels"], minibatch_size(cfg, 1))
    assert list(map(len, batches)) == sizes  # of 8 images a step, and 20 to test
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(20)) and order != list(range(20))
    logits = by_hand(cfg, model, sets[1], batches)
    for found in json.loads((tmp_path / "inference/minibatch/classification_results.json").read_text()):
        row = logits[found["image_id"]]
        assert found["loss"] == pytest.approx(float(row.logsumexp(0) - row[found["label"]]), abs=1e-5)
    assert model.minibatch_size == 1


def test_a_synchronized_norm_has_the_minibatches_of_all_ranks(sets, tmp_path):
    sizes = {
        norm: minibatch_size(config(sets, tmp_path, MODEL__BACKBONE__NORM=norm, SOLVER__ACCUMULATE=2), 2)
        for norm in ("BN", "SyncBN", "GhostBN")
    }
    assert sizes == {"BN": 2, "SyncBN": 4, "GhostBN": 2}


def test_minibatches_made_as_in_training(sets, tmp_path):
    choices = {"DATALOADER__BATCHES": "few_classes", "DATALOADER__CLASSES_PER_BATCH": 2, "TEST__BATCHES": "training"}
    cfg = config(sets, tmp_path, **choices)
    labels = np.load(sets[1])["labels"]
    batches = minibatches(cfg, labels, 8)
    assert batches == minibatches(cfg, labels, 8) and list(map(len, batches)) == [8] * 3
    assert all(len({*labels[batch]}) <= 2 for batch in batches)
    iid = minibatches(config(sets, tmp_path, **choices | {"TEST__BATCHES": "iid"}), labels, 8)
    assert any(len({*labels[batch]}) > 2 for batch in iid)
    cfg = config(sets, tmp_path, DATASETS__TEST=sets[1:], TEST__STATISTICS=["minibatch"], **choices)
    model = classifier(sets, tmp_path)
    scores = dn.evaluate(cfg, model)["minibatch"]["classification"]
    logits = [by_hand(cfg, model, sets[1], [batch]) for batch in batches]
    right = [int(row.argmax()) == labels[i] for own in logits for i, row in own.items()]
    assert scores["top1"] == pytest.approx(100 * np.mean(right), abs=100 / 24 * 8)  # an image may come twice in a batch


def evaluated(rank, sets, folder):
    torch.set_num_threads(1)
    choices = {"TEST__STATISTICS": ["minibatch"], "TEST__MINIBATCH_SIZE": 6, "DATASETS__TEST": sets[1:]}
    return dn.evaluate(config(sets, folder, **choices), classifier(sets, folder))


def test_minibatches_do_not_depend_on_the_number_of_ranks(sets, tmp_path):
    alone = evaluated(0, sets, tmp_path)["minibatch"]["classification"]
    for found in run_ranks(evaluated, 2, sets, tmp_path):
        assert found["minibatch"]["classification"] == pytest.approx(alone, rel=1e-5)


def test_the_training_set_in_training_mode(sets, tmp_path):
    cfg = config(sets, tmp_path, DATASETS__TEST=sets[1:], TEST__TRAINING_IMAGES=16, MODEL__BACKBONE__NORM="GhostBN")
    model = dn.build_model(cfg)
    before = copy.deepcopy(model.state_dict())
    results = dn.evaluate(cfg, model)
    assert list(results) == ["population", "training"] and model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    twin, losses = copy.deepcopy(model), []
    for _, (images, targets) in zip(range(2), train_loader(cfg, rank=0, world_size=1), strict=False):
        with torch.no_grad():
            losses.append(float(twin(images, targets)["loss_cls"]))
    assert results["training"]["classification"]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def train_briefly(sets, folder, **others):
    dn.train(config(sets, folder, SOLVER__MAX_ITER=1, **others))
    return str(folder / "model_final.pth")


def test_weights_of_a_classifier_load_into_others(sets, tmp_path):
    """A RetinaNet's backbone; a classifier of more classes, of whose own last layer a warning tells."""
    file = train_briefly(sets, tmp_path / "a", MODEL__BACKBONE__NAME="resnet18")
    trained = weights_of(file)
    data_set = tiny.write_dataset(tmp_path / "set")
    detector = dn.build_model(
        tiny.config(data_set, tmp_path, MODEL__WEIGHTS=file, MODEL__BACKBONE__NAME="resnet18")
    ).state_dict()
    shared = [name for name in trained if not name.startswith("body.fc.")]
    assert shared and all(torch.equal(detector[f"backbone.{name}"], trained[name]) for name in shared)
    same = classifier(sets, tmp_path, MODEL__BACKBONE__NAME="resnet18", MODEL__WEIGHTS=file).state_dict()
    assert same.keys() == trained.keys() and all(torch.equal(value, trained[name]) for name, value in same.items())


def test_a_classifiers_checkpoint_loads_into_one_of_more_classes(sets, tmp_path):
    file = train_briefly(sets, tmp_path / "a")
    model = classifier(sets, tmp_path, MODEL__WEIGHTS=file, MODEL__CLASSIFIER__NUM_CLASSES=9)
    assert model.body.fc.weight.shape == (9, 64)
    assert torch.equal(model.body.conv1.weight, weights_of(file)["body.conv1.weight"])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm/resnet10t"])
def test_weights_of_the_model_itself_with_other_classes(sets, tmp_path, name, caplog):
    if name.startswith("timm"):
        theirs = pytest.importorskip("timm").create_model(name.removeprefix("timm/"), num_classes=7)
    else:
        theirs = torchvision.models.get_model(name, weights=None, num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = classifier(
        sets,
        tmp_path,
        MODEL__BACKBONE__NAME=name,
        MODEL__WEIGHTS=str(tmp_path / "theirs.pth"),
        MODEL__BACKBONE__NORM="BRN",
    )
    own, expected = model.body.state_dict(), theirs.state_dict()
    differing = {k for k, value in expected.items() if value.shape != own[k].shape or not torch.equal(value, own[k])}
    assert len(differing) == 2 and {own[key].shape[0] for key in differing} == {4}
    assert re.search(r"theirs.pth: .* initialized anew: \S+\{weight,bias\}: 7 → 4 classes", caplog.text)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"MODEL__BACKBONE__NAME": "resnet19"}, "NAME resnet19: .*nearest name is resnet1"),
        ({"MODEL__BACKBONE__NAME": "cifar_resnet9"}, "depth of 18, or 6n"),
        ({"MODEL__BACKBONE__NAME": "timm/resnet10x"}, "unknown to timm; the nearest name is resnet10t"),
        ({"MODEL__BACKBONE__NORM": "FrozenBN"}, "NORM 'FrozenBN' contradicts MODEL.WEIGHTS ''"),
        ({"MODEL__BACKBONE__NORM": "Ghost"}, "BACKBONE.NORM takes one of .*nearest: 'GhostBN'"),
        ({"MODEL__CLASSIFIER__NUM_CLASSES": 2}, "NUM_CLASSES 2 contradicts data set .*4"),
        ({"MODEL__WEIGHTS": "nowhere.pth"}, "nowhere.pth: no such file"),
        ({"MODEL__FPN__NORM": "BN"}, "FPN.NORM 'BN' contradicts MODEL.META_ARCHITECTURE 'Classifier'"),
        ({"MODEL__ROI_HEADS__SHUFFLE": True}, "SHUFFLE True contradicts MODEL.META_ARCHITECTURE 'Classifier'"),
        ({"DATASETS__TRAIN": ["nowhere.npz"]}, r"nowhere\.npz"),
        ({"DATASETS__TRAIN": ["shapes_train"]}, "'shapes_train'.*patches_train"),
        ({"DATASETS__TEST": ["nowhere.npz"]}, r"nowhere\.npz"),
        ({"DATALOADER__BATCHES": "few_classes"}, "CLASSES_PER_BATCH 0 contradicts DATALOADER.BATCHES 'few_classes'"),
        ({"SOLVER__WEIGHT_DECAY_NORM_TARGET": 0.5}, "WEIGHT_DECAY_NORM_TARGET takes one of"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(sets, tmp_path, choices, message):
    if "timm" in str(choices):
        pytest.importorskip("timm")
    with pytest.raises(dn.UserError, match=message) as error:
        dn.train(config(sets, tmp_path / "out", **choices))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# What is found only when the model runs, or later: a traceback of many lines.
LATE = [
    ({"MODEL__BACKBONE__NORM": "GhostBN", "MODEL__NORM__GHOSTBN__SAMPLES_PER_GROUP": 16}, "lower SAMPLES_PER_GROUP"),
    ({"MODEL__BACKBONE__NORM": "SeqNorm", "MODEL__NORM__SEQNORM__NUM_SAMPLE_GROUPS": 16}, "lower NUM_SAMPLE_GROUPS"),
    ({"MODEL__BACKBONE__NORM": "BRN", "MODEL__NORM__BRN__SAMPLES_PER_GROUP": 16}, "lower SAMPLES_PER_GROUP"),
    (
        {"MODEL__BACKBONE__NORM": "BGN", "MODEL__NORM__BGN__NUM_GROUPS": 7, "MODEL__NORM__BGN__SPLIT_SPACE": True},
        "BGN",
    ),
    ({"MODEL__BACKBONE__NAME": "alexnet"}, "CROP_SIZE"),
]


def test_a_backbone_with_auxiliary_heads_is_built_without(sets, tmp_path):
    model = classifier(sets, tmp_path, MODEL__BACKBONE__NAME="googlenet", INPUT__CROP_SIZE=64)
    losses = model([torch.rand(3, 64, 64)] * 2, [{"labels": torch.tensor(1)}] * 2)
    assert losses["loss_cls"].isfinite() and not any("aux" in name for name in model.state_dict())


@pytest.mark.parametrize(("choices", "name"), LATE)
def test_mistakes_that_show_in_the_first_step_are_one_line_too(sets, tmp_path, choices, name):
    with pytest.raises(dn.UserError, match=name):
        dn.train(config(sets, tmp_path / "out", **choices))
    assert not (tmp_path / "out").exists()
