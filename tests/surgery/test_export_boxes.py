"""A detector in ONNX, from an image to its final boxes, finds what a Predictor finds."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

import domainnorm as dn
from domainnorm.cli import export as export_net
from domainnorm.config import save_config
from domainnorm.data.classes import with_classes
from domainnorm.engine.checkpoint import save_model
from domainnorm.layers import DomainBatchNorm
from domainnorm.surgery import export_boxes

onnxruntime = pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"
NAMES = ["kind 3", "kind 7"]
V2 = {"MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ROIAlignV2", "MODEL__ROI_MASK_HEAD__POOLER_TYPE": "ROIAlignV2"}
DOMAINS = {
    "DATASETS__TRAIN": ["a:b", "c:d"],
    "DATASETS__DOMAINS": ["day", "night"],
    "MODEL__NORM_DOMAINS": "dataset",
    "MODEL__RETINANET__NORM_DOMAINS": "level_and_dataset",
}
DETECTORS = {
    "RetinaNet": {},
    "Mask R-CNN": tiny.MASK_RCNN,
    "Mask R-CNN, aligned": tiny.MASK_RCNN | V2,
    "one domain": DOMAINS,
}
SIZES = ((50, 70), (97, 64), (60, 31), (333, 64), (64, 64), (150, 200))


def saved(folder, **others):
    """A checkpoint of random weights and statistics that finds much, and the config beside it."""
    sizes = {"INPUT__MIN_SIZE_TEST": 96, "INPUT__MAX_SIZE_TEST": 160}
    cfg = with_classes(tiny.config("a:b", folder, **sizes | others), NAMES)
    torch.manual_seed(1)
    model = dn.build_model(cfg)
    for layer in model.modules():
        if isinstance(layer, DomainBatchNorm):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    if hasattr(model, "head"):
        last = model.head.classification_head.cls_logits
        nn.init.normal_(last.weight, std=2)
        nn.init.zeros_(last.bias)
    save_model(cfg, "net.pth", model)
    save_config(cfg, folder / "config.yaml")
    return folder / "net.pth"


def exported(weights, *words):
    """By the command line."""
    file = weights.with_name("net.onnx")
    given = ["--config-file", weights.with_name("config.yaml"), "--format", "onnx", "--boxes", "--out", file, *words]
    assert export_net.main([str(word) for word in (*given, "MODEL.WEIGHTS", weights)]) == 0
    return file


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_what_a_predictor_finds(detector, tmp_path, capsys):
    weights = saved(tmp_path, **DETECTORS[detector])
    domain = ["--domain", "night"] if detector == "one domain" else []
    session = onnxruntime.InferenceSession(str(exported(weights, *domain)))
    assert "net.onnx: images (1, 3, H, W); largest difference " in capsys.readouterr().out
    predict = dn.Predictor(weights, domain=(domain or [None])[-1], exact=True, score=0.0)
    generator = np.random.default_rng(0)
    for height, width in SIZES:
        image = np.asarray(
            Image.fromarray(generator.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        )
        pixels = image.astype(np.float32).transpose(2, 0, 1)[None] / 255
        found = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"images": pixels}), strict=True))
        own = predict(image)
        assert len(own) > 5
        other = [torch.as_tensor(found[name]) for name in ("boxes", "scores", "labels")]
        masks = []
        if own.masks is not None:
            assert found["masks"].shape == (len(own), height, width)
            masks = [own.masks.float()], [torch.as_tensor(found["masks"] >= 0.5).float()]
        own_side, other_side = masks or ([], [])
        rows = [own.boxes, own.scores, own.labels, *own_side], [*other, *other_side]
        assert export_boxes._difference(rows[0][:3], rows[1][:3], max(height, width)) < 1e-4
        assert export_boxes._difference(*rows, max(height, width)) < 2e-3  # a mask's pixels at 0.5 may be rounded


@pytest.mark.slow
def test_metadata_and_axes(tmp_path):
    session = onnxruntime.InferenceSession(str(exported(saved(tmp_path, **tiny.MASK_RCNN))))
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", [1, 3, "H", "W"])]
    shapes = {output.name: output.shape for output in session.get_outputs()}
    assert shapes == {"boxes": ["n", 4], "scores": ["n"], "labels": ["n"], "masks": ["n", "H", "W"]}
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["architecture"] == "GeneralizedRCNN" and json.loads(metadata["class_names"]) == NAMES
    assert (metadata["min_size"], metadata["max_size"]) == ("96", "160")
    assert json.loads(metadata["pixel_mean"]) == [0.485, 0.456, 0.406] and len(json.loads(metadata["pixel_std"])) == 3


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["RetinaNet", "Mask R-CNN"])
def test_nothing_to_find(detector, tmp_path):
    weights = saved(tmp_path, **DETECTORS[detector])
    key = "ROI_HEADS" if detector == "Mask R-CNN" else "RETINANET"
    session = onnxruntime.InferenceSession(str(exported(weights, f"MODEL.{key}.SCORE_THRESH_TEST", 1.0)))
    found = session.run(None, {"images": np.zeros((1, 3, 70, 50), np.float32)})
    assert [len(value) for value in found] == [0] * len(found)


@pytest.mark.slow
def test_the_example_finds_and_draws_the_same(tmp_path):
    weights = saved(tmp_path)
    net = exported(weights)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = tmp_path / "photo.png"
    Image.fromarray(pixels).resize((120, 90), Image.BICUBIC).save(photo, exif=exif)
    spec = importlib.util.spec_from_file_location("onnx_predict", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(str(net), str(photo), tmp_path / "drawn.png")
    own = dn.Predictor(weights, exact=True)(photo)
    assert [name for name, _, _ in found] == own.names and len(found) > 3
    np.testing.assert_allclose([score for _, score, _ in found], own.scores, atol=1e-4)
    np.testing.assert_allclose([box for _, _, box in found], own.boxes, atol=1e-4 * 120)
    drawn = np.asarray(Image.open(tmp_path / "drawn.png"))
    assert drawn.shape == (120, 90, 3) and (drawn == (255, 0, 0)).all(2).sum() > 50


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    weights = saved(tmp_path)
    cfg = dn.load_config(tmp_path / "config.yaml", ["MODEL.WEIGHTS", str(weights)])
    run = export_boxes._runner
    monkeypatch.setattr(export_boxes, "_runner", lambda content: lambda image: [v * 1.001 for v in run(content)(image)])
    with pytest.raises(dn.UserError, match=r"not written, because its outputs would differ .* more than atol=1.0e-04"):
        dn.export_model(dn.build_model(cfg), tmp_path / "net.onnx", "onnx", boxes=True)
    assert not (tmp_path / "net.onnx").exists()


def test_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(dn.UserError, match="boxes: expected a detector of build_model and format 'onnx', got Sequent"):
        dn.export_model(model, tmp_path / "net.onnx", "onnx", boxes=True)
    with pytest.raises(dn.UserError, match="format 'onnx', got format 'torch'"):
        dn.export_model(model, tmp_path / "net.pt2", boxes=True)
    model = dn.build_model(tiny.config("a:b", tmp_path, MODEL__RETINANET__NUM_CLASSES=2))
    with pytest.raises(dn.UserError, match="boxes: minibatch statistics cannot be traced"):
        dn.export_model(model, tmp_path / "net.onnx", "onnx", boxes=True, statistics="minibatch")


def test_how_detections_differ():
    own = [torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30]]), torch.tensor([0.9, 0.8]), torch.tensor([0, 1])]
    order = [value.flip(0) for value in own]
    assert export_boxes._difference(own, order, 100) == 0
    moved = [own[0] + torch.tensor([0.0, 0, 0, 1]), *own[1:]]
    assert export_boxes._difference(own, moved, 100) == pytest.approx(0.01)
    fewer, none = [value[:1] for value in own], [value[:0] for value in own]
    assert export_boxes._difference(own, fewer, 100) >= 1  # another class
    assert export_boxes._difference(own, none, 100) == float("inf") and export_boxes._difference(none, none, 9) == 0
    masks = torch.zeros(2, 4, 4)
    masks[1] = 0.5
    assert export_boxes._difference([*own, masks], [*order, masks], 100) == 0.5
    assert export_boxes._difference([*own, masks], [*order, masks.flip(0)], 100) == 0
