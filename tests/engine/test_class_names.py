"""Checkpoints say what their classes are, and labels are found by the names of classes, never by their order."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torchvision

import domainnorm as dn
from domainnorm.cli import export as export_net
from domainnorm.cli import train as train_net
from domainnorm.data.classes import with_classes
from domainnorm.engine import checkpoint
from domainnorm.modeling.checkpoint_file import read_checkpoint, write_checkpoint

NAMES = ["kind 3", "kind 7"]
VERSIONS = {
    "domainnorm": dn.__version__,
    "torch": str(torch.__version__),
    "torchvision": torchvision.__version__,
}


def renumbered(folder: Path, names: dict[int, str] | None = None) -> str:
    """The data set of `tiny.write_dataset` with its two categories in the other order, or called otherwise."""
    data_set = tiny.write_dataset(folder)
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"] if names is None else ():
        annotation["category_id"] = 10 - annotation["category_id"]
    names = names or {3: "kind 7", 7: "kind 3"}
    content["categories"] = [{"id": id_, "name": name} for id_, name in names.items()]
    file.write_text(json.dumps(content))
    return data_set


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    others = renumbered(folder / "others", {3: "cat", 7: "dog"})
    return tiny.write_dataset(folder / "set"), renumbered(folder / "renumbered"), others


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    """A run whose detector tells the two classes apart."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny.config(sets[0], folder, SOLVER__MAX_ITER=100, SOLVER__BASE_LR=0.05, SOLVER__CHECKPOINT_PERIOD=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        dn.train(cfg)
    return folder


def scores(cfg, model):
    return dn.evaluate(cfg, model)["population"]["bbox"]


def words(sets, output, *others):
    return [*map(str, tiny.options("", output, DATASETS__TRAIN=[], DATASETS__TEST=sets)), *map(str, others)]


# --- what a checkpoint says -----------------------------------------------------------------------------------------


def test_a_checkpoint_describes_its_model(run):
    content = read_checkpoint(run / "model_final.pth")
    assert content["description"] == {
        "architecture": "RetinaNet",
        "num_classes": 2,
        "class_names": NAMES,
        "domains": [],
        "min_size": 64,
        "max_size": 64,
        "pixel_mean": [0.485, 0.456, 0.406],
        "pixel_std": [0.229, 0.224, 0.225],
        "versions": VERSIONS,
    }
    cfg = dn.load_config(run / "config.yaml")
    assert cfg.MODEL.CLASS_NAMES == NAMES and cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert cfg.dump() == content["config"]


def test_the_saved_config_builds_the_model_without_a_data_set(run):
    cfg = dn.load_config(run / "config.yaml", ["DATASETS.TRAIN", "[]", "MODEL.WEIGHTS", str(run / "model_final.pth")])
    model = dn.build_model(cfg, trained=True)
    assert model.description["class_names"] == NAMES
    content = read_checkpoint(run / "model_final.pth")
    assert model.description == content["description"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, content["model"][key])


def test_weights_say_what_a_config_leaves_open(run, tmp_path):
    """Neither a data set nor a number of classes."""
    cfg = tiny.config("gone.json:gone", tmp_path, MODEL__WEIGHTS=str(run / "model_final.pth"))
    assert dn.build_model(cfg).description["class_names"] == NAMES


def test_of_a_classifier(tmp_path):
    cfg = classifier(archive(tmp_path / "a.npz", ["ant", "bee"]), tmp_path / "run", SOLVER__AVERAGE_WEIGHTS="EMA")
    dn.train(cfg)
    for name in ("model_final.pth", "model_averaged.pth"):
        description = read_checkpoint(tmp_path / "run" / name)["description"]
        assert description["class_names"] == ["ant", "bee"] and description["crop_size"] == 8
        assert description["num_classes"] == 2 and description["versions"] == VERSIONS


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_an_exported_file_describes_its_model(run, sets, tmp_path, format):
    file = tmp_path / "net"
    names = ["DATASETS.TRAIN", "[]", "MODEL.WEIGHTS", str(run / "model_final.pth")]
    arguments = ["--config-file", str(run / "config.yaml"), "--format", format, "--out", str(file)]
    assert export_net.main([*arguments, *names]) == 0
    expected = read_checkpoint(run / "model_final.pth")["description"]
    if format == "torch":
        extra = {"description.json": ""}
        torch.export.load(file, extra_files=extra)
        assert json.loads(extra["description.json"]) == expected
    else:
        found = pytest.importorskip("onnxruntime").InferenceSession(str(file)).get_modelmeta().custom_metadata_map
        assert found.pop("architecture") == expected.pop("architecture")
        assert {key: json.loads(value) for key, value in found.items()} == expected


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_a_test_set_in_another_order_has_the_same_ap(run, sets, tmp_path):
    file = run / "model_final.pth"
    model = dn.build_model(tiny.config("", tmp_path, DATASETS__TRAIN=[], MODEL__WEIGHTS=str(file)), trained=True)
    found = [scores(tiny.config("", tmp_path, DATASETS__TRAIN=[], DATASETS__TEST=[name]), model) for name in sets[:2]]
    assert found[0]["AP50"] > 30 and found[0] == pytest.approx(found[1], abs=0, rel=0, nan_ok=True)
    # Where nobody tells names, labels are positions.
    del model.description
    other = scores(tiny.config("", tmp_path, DATASETS__TRAIN=[], DATASETS__TEST=[sets[1]]), model)
    assert other["AP50"] < found[0]["AP50"] / 2


def test_eval_only_knows_the_names_from_the_checkpoint(run, sets, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("MODEL: {DEVICE: cpu}")
    for number, name in enumerate(sets):
        output = tmp_path / str(number)
        arguments = ["--config-file", str(tmp_path / "empty.yaml"), "--eval-only"]
        arguments += words([name], output, "MODEL.WEIGHTS", run / "model_final.pth")
        assert train_net.main(arguments) == (0 if number < 2 else 2)
    results = [json.loads((tmp_path / str(number) / "results.json").read_text()) for number in (0, 1)]
    assert results[0] == results[1] and results[0]["population"]["bbox"]["AP50"] > 30
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "has the categories ['cat', 'dog'], the model is trained on ['kind 3', 'kind 7']" in line


def test_a_training_set_of_other_classes_does_not_name_those_of_a_trained_model(run, sets, tmp_path):
    cfg = tiny.config(sets[2], tmp_path, MODEL__WEIGHTS=str(run / "model_final.pth"))
    with pytest.raises(
        dn.UserError, match=r"model_final.pth: .* of the classes \['kind 3', 'kind 7'\], .*'cat', 'dog'"
    ):
        dn.build_model(cfg, trained=True)


def test_names_of_an_old_checkpoint_are_not_known(run, sets, tmp_path, caplog):
    content = read_checkpoint(run / "model_final.pth")
    del content["description"]
    write_checkpoint(content, tmp_path / "old.pth")
    cfg = tiny.config(
        "", tmp_path, DATASETS__TRAIN=[], DATASETS__TEST=[sets[0]], MODEL__WEIGHTS=str(tmp_path / "old.pth")
    )
    model = dn.build_model(cfg, trained=True)
    assert model.description["class_names"] == [] and model.description["num_classes"] == 2
    with caplog.at_level(logging.WARNING):
        assert scores(cfg, model)["AP50"] > 30
    assert "nothing says what the classes of the model are called" in caplog.text
    named = with_classes(cfg, NAMES)
    assert dn.build_model(named, trained=True).description["class_names"] == NAMES


@pytest.mark.parametrize("names", [3, [1, 2], {"a": 0}])
def test_names_that_are_none_are_refused(run, tmp_path, names):
    content = read_checkpoint(run / "model_final.pth")
    write_checkpoint(content | {"description": {"class_names": names}}, tmp_path / "broken.pth")
    with pytest.raises(dn.UserError, match=r"broken.pth: broken: expected a list of names of classes"):
        dn.build_model(tiny.config("", tmp_path, DATASETS__TRAIN=[], MODEL__WEIGHTS=str(tmp_path / "broken.pth")))


# --- weights of classes in another order ----------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{}, tiny.MASK_RCNN], ids=["RetinaNet", "Mask R-CNN"])
def test_weights_follow_the_names(tmp_path, choices):
    """The detector of three classes in another order finds the same, under the other numbers."""
    names, other = ["a", "b", "c"], ["c", "a", "b"]
    options = {"DATASETS__TRAIN": [], "MODEL__BACKBONE__NORM": "GN"} | choices
    cfg = tiny.config("", tmp_path, **options, MODEL__CLASS_NAMES=names)
    model = dn.build_model(cfg).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    write_checkpoint({"model": model.state_dict(), "description": model.description}, tmp_path / "w.pth")
    found = dn.build_model(
        tiny.config("", tmp_path, **options, MODEL__CLASS_NAMES=other, MODEL__WEIGHTS=str(tmp_path / "w.pth"))
    ).eval()
    image = torch.rand(3, 64, 64)
    (first,), (second,) = model([image]), found([image])
    assert len(first["labels"]) > 10
    numbers = torch.tensor([other.index(name) for name in names])
    assert torch.equal(numbers[first["labels"]], second["labels"])
    for key in first.keys() - {"labels"}:
        torch.testing.assert_close(first[key], second[key])


def test_rows_without_a_name_stay(tmp_path):
    options = {"DATASETS__TRAIN": [], "MODEL__RETINANET__NUM_CLASSES": 4}
    model = dn.build_model(tiny.config("", tmp_path, **options, MODEL__CLASS_NAMES=["a", "b"]))
    write_checkpoint({"model": model.state_dict(), "description": model.description}, tmp_path / "w.pth")
    options |= {"MODEL__CLASS_NAMES": ["b", "a"], "MODEL__WEIGHTS": str(tmp_path / "w.pth")}
    found = dn.build_model(tiny.config("", tmp_path, **options))
    one, other = (m.head.classification_head.cls_logits.weight.unflatten(0, (9, 4)) for m in (model, found))
    assert torch.equal(one[:, [1, 0, 2, 3]], other)


# --- training -------------------------------------------------------------------------------------------------------


def test_training_sets_in_different_orders_are_one(sets, tmp_path):
    """The same images twice: with labels by name, both halves of a batch cost the same."""
    keys = {"DATASETS__TRAIN": list(sets[:2]), "SOLVER__MAX_ITER": 1}
    with pytest.raises(dn.UserError, match="in the same order"):
        dn.train(tiny.config(sets[0], tmp_path / "a", **keys))
    dn.train(tiny.config(sets[0], tmp_path / "a", DATASETS__LABELS="union", **keys))
    assert dn.load_config(tmp_path / "a" / "config.yaml").MODEL.CLASS_NAMES == NAMES


def test_resuming_on_a_set_in_another_order_changes_nothing(sets, tmp_path):
    """To the bit: it goes on with the labels that it had. On other classes it is refused."""
    data = Path(sets[0].rpartition(":")[0])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dn.train(tiny.config(sets[0], whole))
    dn.train(tiny.config(sets[0], parts, SOLVER__MAX_ITER=2))
    before = data.read_bytes()
    try:
        for content, refused in ((sets[2], True), (sets[1], False)):
            data.write_bytes(Path(content.rpartition(":")[0]).read_bytes())
            cfg = tiny.config(sets[0], parts)
            if refused:
                with pytest.raises(
                    dn.UserError, match=r"\['cat', 'dog'\], the model is trained on \['kind 3', 'kind 7'"
                ):
                    dn.train(cfg, resume=True)
            else:
                dn.train(cfg, resume=True)
    finally:
        data.write_bytes(before)
    one, other = (read_checkpoint(folder / "model_final.pth")["model"] for folder in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_resuming_with_other_names_in_the_config(sets, tmp_path):
    cfg = tiny.config(sets[0], tmp_path, SOLVER__MAX_ITER=2)
    dn.train(cfg)
    again = dn.load_config(tmp_path / "config.yaml")
    assert checkpoint.read_training(again, tmp_path / "model_final.pth")["iteration"] == 2  # what it wrote itself
    with pytest.raises(dn.UserError, match=r"MODEL.CLASS_NAMES was \['kind 3', 'kind 7'\], is \['kind 7', 'kind 3'\]"):
        checkpoint.read_training(with_classes(cfg, NAMES[::-1]), tmp_path / "model_final.pth")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], r"MODEL.CLASS_NAMES takes names that differ, none of them empty, got \['a', 'a'\]"),
        (["a", ""], r"MODEL.CLASS_NAMES takes names that differ, none of them empty, got"),
        (["a", "b", "c"], r"MODEL.RETINANET.NUM_CLASSES 2 contradicts MODEL.CLASS_NAMES .*: there are 3 names"),
    ],
)
def test_names_that_cannot_be(tmp_path, names, message):
    with pytest.raises(dn.UserError, match=message):
        tiny.config("a:b", tmp_path, MODEL__CLASS_NAMES=names, MODEL__RETINANET__NUM_CLASSES=2)


# --- classifiers ----------------------------------------------------------------------------------------------------


def archive(file: Path, names: list[str], order=(0, 1), count: int = 24) -> str:
    """Images whose class is their brightness."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).integers(0, 60, (count, 8, 8, 3))
    images = (noise + 120 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(file, images=images, labels=np.array(order)[labels], class_names=[names[i] for i in order])
    return str(file)


def classifier(data_set: str, output: Path, **others):
    choices = {
        "MODEL__META_ARCHITECTURE": "Classifier",
        "MODEL__BACKBONE__NAME": "cifar_resnet8",
        "MODEL__RETINANET__NORM": "",
        "INPUT__CROP_SIZE": 8,
        "INPUT__CROP": "none",
    }
    return tiny.config(data_set, output, **(choices | others))


def test_a_classifier_is_evaluated_by_name(tmp_path):
    names = ["dark", "light"]
    one, other = archive(tmp_path / "a.npz", names), archive(tmp_path / "b.npz", names, order=(1, 0))
    dn.train(classifier(one, tmp_path / "run", SOLVER__MAX_ITER=30, SOLVER__BASE_LR=0.05))
    weights = {"MODEL__WEIGHTS": str(tmp_path / "run" / "model_final.pth"), "DATASETS__TRAIN": []}
    model = dn.build_model(classifier("", tmp_path, **weights), trained=True)
    results = [dn.evaluate(classifier("", tmp_path, **weights, DATASETS__TEST=[name]), model) for name in (one, other)]
    assert results[0] == results[1] and results[0]["population"]["classification"]["top1"] == 100
    unnamed = str(tmp_path / "c.npz")
    np.savez(unnamed, **{key: value for key, value in np.load(other).items() if key != "class_names"})
    with pytest.raises(dn.UserError, match=r"categories \['0', '1'\], the model is trained on \['dark', 'light'\]"):
        dn.evaluate(classifier("", tmp_path, **weights, DATASETS__TEST=[unnamed]), model)
    turned = dn.build_model(classifier("", tmp_path, **weights, MODEL__CLASS_NAMES=names[::-1]))
    images = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(turned.eval()(images), model.eval()(images).flip(1))
