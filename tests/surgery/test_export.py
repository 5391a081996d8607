"""What a file computes that domainnorm.export wrote, and what cannot be written."""

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import domainnorm as dn
from domainnorm.cli import export as export_net
from domainnorm.config import save_config
from domainnorm.modeling.cifar_resnet import CifarResNet

SAMPLES = {
    "BN": {},
    "GhostBN": {"samples_per_group": 2},
    "SeqNorm": {"num_channel_groups": 4, "num_sample_groups": 2},
    "GBGN": {"num_channel_groups": 4, "samples_per_group": 2},
    "BGN": {"num_groups": 4},
    "BRN": {},
    "GN": {"num_groups": 4},
}


class Net(nn.Module):
    """Small enough to export in a second: two strides, and a norm of each kind of shape."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)]
        self.body = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x):
        return self.body(x)


def trained(name="BN", body=None, **options):
    """A classifier whose norms have seen data, in eval mode."""
    model = dn.convert_batchnorm(body or Net(), name, **(SAMPLES[name] | options))
    for _ in range(3):
        model.train()(2 * torch.randn(4, 3, 32, 32) + 1)
    return model.eval()


def loaded(file):
    return torch.export.load(file).module()


def onnx_run(file, images):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(file))
    return [torch.from_numpy(v) for v in session.run(None, {session.get_inputs()[0].name: images.numpy()})]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "statistics"),
    [*((name, "population") for name in SAMPLES), *((name, "minibatch") for name in ("GhostBN", "SeqNorm"))],
)
def test_classifiers(name, statistics, tmp_path):
    model, file = trained(name), tmp_path / "net.pt2"
    done = dn.export_model(model, file, size=(32, 32), statistics=statistics)
    per_image = statistics == "minibatch" and name != "GN"
    assert done.images == (1 if per_image else "N", 3, "H", "W") and done.difference <= 1e-5
    assert len({n for n, _, _ in done.checked}) == (1 if per_image else 3) and len(done.checked) >= 3
    if name != "GN":
        dn.set_statistics(model, statistics)
    net = loaded(file)
    for shape in ((1 if per_image else 5, 3, 40, 52), (1, 3, 33, 31)):
        images = torch.randn(shape)
        torch.testing.assert_close(net(images), model(images), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BN", "GBGN"])
def test_example_weight(name, tmp_path):
    plain, weighed = trained(name), tmp_path / "net.pt2"
    images = torch.randn(3, 3, 24, 40)
    before = plain(images)
    dn.set_example_weight(plain, 0.3)
    dn.export_model(plain, weighed, size=(32, 32))
    got = loaded(weighed)(images)
    torch.testing.assert_close(got, plain(images), atol=1e-5, rtol=0)
    assert (got - before).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weight", "fused"), [("BN", 0.0, True), ("GhostBN", 0.2, False), ("BGN", 0.0, False)])
def test_onnx(name, weight, fused, tmp_path):
    pytest.importorskip("onnxscript")
    model, file = trained(name), tmp_path / "net.onnx"
    dn.set_example_weight(model, weight)
    done = dn.export_model(model, file, "onnx", size=(32, 32), fused=fused)
    assert done.images == ("N", 3, "H", "W") and 0 <= done.difference <= 1e-5
    images = torch.randn(5, 3, 47, 36)
    torch.testing.assert_close(onnx_run(file, images)[0], model(images), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_onnx_of_minibatch_statistics(tmp_path):
    pytest.importorskip("onnxscript")
    model, file = trained("SeqNorm"), tmp_path / "net.onnx"
    assert dn.export_model(model, file, "onnx", size=(32, 32), statistics="minibatch").images[0] == 1
    dn.set_statistics(model, "minibatch")
    images = torch.randn(1, 3, 40, 28)
    torch.testing.assert_close(onnx_run(file, images)[0], model(images), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_fused_and_as_it_was(tmp_path):
    """A fused file has no norm; the model that it is made of keeps its own, its mode and its statistics."""
    model = dn.set_statistics(trained(body=CifarResNet(8, 5)), "minibatch").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for fused in (False, True):
        dn.export_model(model, tmp_path / "net.pt2", size=(32, 32), fused=fused)
        nodes = [str(node.target) for node in torch.export.load(tmp_path / "net.pt2").graph.nodes]
        assert any("batch_norm" in node for node in nodes) is not fused
    assert model.training and model.bn1.statistics == "minibatch" and isinstance(model.bn1, dn.DomainBatchNorm)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_size_where_the_model_takes_one(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 2))
    done = dn.export_model(model, tmp_path / "net.pt2", size=(8, 8))
    assert done.images == ("N", 3, 8, 8) and {size[1:] for size in done.checked} == {(8, 8)}


def retinanet(**others):
    chosen = {
        "MODEL__BACKBONE__NAME": "resnet18",
        "MODEL__RETINANET__NUM_CLASSES": 2,
        "MODEL__RETINANET__AFFINE": "per_domain",
    }
    model = dn.build_model(tiny.config("a:b", Path("out"), **chosen | others))
    scramble(model)
    return model.eval()


@torch.no_grad()
def scramble(model):
    """Statistics and affines of domains, and predictions, that differ."""
    for layer in model.modules():
        if isinstance(layer, dn.DomainBatchNorm):
            for value in (layer.running_var, layer.weight):
                value.uniform_(0.5, 1.5)
            layer.running_mean.normal_(std=0.1)
        elif isinstance(layer, nn.Conv2d) and layer.weight.std() < 0.02:
            layer.weight.mul_(10)  # of RetinaNet's head


def detections(model, outputs, images):
    """What a deployed detector's own decoding and NMS would find."""
    logits, boxes, anchors = outputs
    levels = [9 * (-(-images.shape[2] // s)) * (-(-images.shape[3] // s)) for s in (8, 16, 32, 64, 128)]
    split = {"cls_logits": list(logits.split(levels, 1)), "bbox_regression": list(boxes.split(levels, 1))}
    return model.postprocess_detections(split, [list(anchors.split(levels))], [tuple(images.shape[2:])])[0]


def assert_dense(model, outputs, images):
    with torch.no_grad():
        own = model.head(list(model.backbone(model.transform.normalize(images)).values()))
    for value, expected in zip(outputs, own.values(), strict=False):
        torch.testing.assert_close(value, expected, atol=1e-5 * max(1, float(expected.abs().max())), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["population", "minibatch"])
def test_retinanet_with_levels(statistics, tmp_path):
    """The file, then decoding and NMS, is the model."""
    backbone = "BN" if statistics == "population" else "FrozenBN"
    model = retinanet(INPUT__MIN_SIZE_TEST=160, INPUT__MAX_SIZE_TEST=192, MODEL__BACKBONE__NORM=backbone)
    file = tmp_path / "net.pt2"
    done = dn.export_model(model, file, size=(160, 160), statistics=statistics)
    assert done.images == ("N" if statistics == "population" else 1, 3, "32·H", "32·W")
    images = torch.rand(1, 3, 160, 192)
    outputs = list(loaded(file)(images).values())
    assert_dense(dn.set_statistics(model, statistics), outputs, images)
    with torch.no_grad():
        found, own = detections(model, outputs, images), model([images[0]])[0]
    assert len(own["boxes"]) > 10
    for key, value in found.items():
        torch.testing.assert_close(value, own[key], atol=1e-3, rtol=1e-4)


DATA_SETS = {
    "DATASETS__TRAIN": ["a:b", "c:d"],
    "DATASETS__DOMAINS": ["day", "night"],
    "MODEL__NORM_DOMAINS": "dataset",
    "MODEL__RETINANET__NORM_DOMAINS": "level_and_dataset",
}


@pytest.mark.slow
def test_retinanet_for_one_data_set(tmp_path):
    model, file = retinanet(**DATA_SETS), tmp_path / "net.pt2"
    images, results = torch.rand(1, 3, 192, 160), []
    for domain, fused in (("day", False), (1, True)):
        dn.export_model(model, file, size=(160, 160), domain=domain, fused=fused)
        results.append(list(loaded(file)(images).values()))
        with dn.use_domain(model, domain):
            assert_dense(model, results[-1], images)
    assert (results[0][0] - results[1][0]).abs().max() > 0.01
    with pytest.raises(dn.UserError, match=r"say which to export for, of \['day', 'night'\]"):
        dn.export_model(model, file)
    with pytest.raises(dn.UserError, match=r"domains of backbone.body.bn1 are \['day', 'night'\], got 'dusk'"):
        dn.export_model(model, file, domain="dusk")


@pytest.mark.slow
def test_retinanet_in_onnx(tmp_path):
    """Its head has data sets for domains, and its levels share them."""
    pytest.importorskip("onnxscript")
    model = retinanet(**DATA_SETS | {"MODEL__RETINANET__NORM_DOMAINS": "dataset"})
    done = dn.export_model(model, tmp_path / "net.onnx", "onnx", size=(160, 160), domain="night")
    assert done.images == ("N", 3, "32·H", "32·W") and done.difference <= 1e-5
    images = torch.rand(2, 3, 192, 160)
    with dn.use_domain(model, "night"):
        assert_dense(model, onnx_run(tmp_path / "net.onnx", images), images)


def test_keep_domain():
    layer = dn.DomainBatchNorm(4, num_domains=6, affine="per_domain")
    nn.init.uniform_(layer.running_mean)
    nn.init.uniform_(layer.weight)
    layer.domains_per_name = 2  # two levels of three data sets
    mean, weight = layer.running_mean.clone(), layer.weight.clone()
    dn.keep_domain(nn.Sequential(layer), 1)
    assert layer.num_domains == 2 and layer.num_batches_tracked.shape == (2,)
    assert torch.equal(layer.running_mean, mean[2:4]) and torch.equal(layer.weight, weight[2:4])
    shared = dn.DomainBatchNorm(4, num_domains=4, population_statistics="shared")
    buffers = dict(shared.named_buffers())
    dn.keep_domain(nn.Sequential(shared), 3)
    assert shared.num_domains == 1 and all(shared.get_buffer(k) is v for k, v in buffers.items())
    with pytest.raises(ValueError, match="no norm with several domains"):
        dn.keep_domain(nn.Sequential(shared), 0)


class Several(Net):
    def forward(self, x):
        return (super().forward(x), 1)


class Unlucky(Net):
    """Exported in eval mode, where its outputs are not what they are next time."""

    def forward(self, x):
        return super().forward(x) + torch.rand(())


class RoundsSizes(Net):
    def forward(self, x):
        return super().forward(x[: int(x.abs().sum() > 0)])


REFUSED = {
    "format takes one of": (Net, {"format": "tflite"}),
    "statistics takes one of": (Net, {"statistics": "recomputed"}),
    "minibatch statistics cannot be fused": (trained, {"statistics": "minibatch", "fused": True}),
    "example_weight=0.5, which cannot be fused": (lambda: dn.set_example_weight(trained(), 0.5), {"fused": True}),
    "is torch's BatchNorm2d": (Net, {"statistics": "minibatch"}),
    "no norm with several domains": (trained, {"domain": 0}),
    "say which to export for, of 0 to 2": (lambda: dn.convert_batchnorm(Net(), "BN", num_domains=3), {}),
    "domains are 0 to 2, got 3": (lambda: dn.convert_batchnorm(Net(), "BN", num_domains=3), {"domain": 3}),
    "returns a tensor or a dict of tensors": (Several, {}),
    "not written, because its outputs would differ": (Unlucky, {}),
    "torch cannot export the model": (RoundsSizes, {}),
    "a GeneralizedRCNN cannot be exported": (lambda: rcnn(), {}),
    "size takes multiples of 32 from 160 on": (retinanet, {"size": (64, 160)}),
}


def rcnn():
    return dn.build_model(tiny.config("a:b", Path("out"), **tiny.MASK_RCNN, MODEL__ROI_HEADS__NUM_CLASSES=2))


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line(message, tmp_path):
    make, options = REFUSED[message]
    file = tmp_path / "net.pt2"
    file.write_text("before")
    with pytest.raises(dn.UserError) as caught:
        dn.export_model(make(), file, **{"size": (32, 32)} | options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["net.pt2"] and file.read_text() == "before"


def test_refused_places_and_packages(tmp_path, monkeypatch):
    with pytest.raises(dn.UserError, match=r"absent.* cannot be written"):
        dn.export_model(Net(), tmp_path / "absent" / "net.pt2")
    with pytest.raises(dn.UserError, match="cannot be written"):
        dn.export_model(Net(), tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(dn.UserError, match=r"not installed: pip install onnxscript$"):
        dn.export_model(Net(), tmp_path / "net.onnx", "onnx")
    assert not list(tmp_path.iterdir())


CLASSIFIER = {
    "MODEL__META_ARCHITECTURE": "Classifier",
    "MODEL__BACKBONE__NAME": "cifar_resnet8",
    "MODEL__RETINANET__NORM": "",
    "MODEL__CLASSIFIER__NUM_CLASSES": 3,
    "INPUT__CROP_SIZE": 32,
}


@pytest.fixture
def classifier(tmp_path):
    """A config file, its model, and the checkpoint of that."""
    data = {"DATASETS__TRAIN": ["a.npz", "b.npz"], "DATASETS__DOMAINS": ["x", "y"], "MODEL__NORM_DOMAINS": "dataset"}
    cfg = tiny.config("a.npz", tmp_path / "out", **CLASSIFIER | data)
    save_config(cfg, tmp_path / "config.yaml")
    model = dn.build_model(cfg)
    scramble(model)
    torch.save({"model": model.state_dict()}, tmp_path / "net.pth")
    return model.eval()


def run(tmp_path, *words):
    given = ["--config-file", tmp_path / "config.yaml", "--out", tmp_path / "net.pt2", "--format", "torch", *words]
    return export_net.main([str(word) for word in given])


@pytest.mark.slow
def test_the_command_line(classifier, tmp_path, capsys):
    weights = ("MODEL.WEIGHTS", tmp_path / "net.pth")
    images = torch.rand(4, 3, 32, 40)
    with torch.no_grad():
        for domain, index, more in (("y", 1, ("--fuse",)), ("0", 0, ("--example-weight", 0.2, "--atol", 1e-4))):
            assert run(tmp_path, "--domain", domain, *more, *weights) == 0
            assert "net.pt2: images (N, 3, H, W); largest difference " in capsys.readouterr().out
            if "--fuse" not in more:
                dn.set_example_weight(classifier, 0.2)
            with dn.use_domain(classifier, index):
                torch.testing.assert_close(loaded(tmp_path / "net.pt2")(images), classifier(images), atol=1e-5, rtol=0)
    (tmp_path / "net.pt2").unlink()
    for words, message in (
        (("--domain", "y"), "MODEL.WEIGHTS is empty"),
        (weights, "say which to export for, of ['x', 'y']"),
        ((*weights, "--domain", "z"), "the domains of body.bn1 are ['x', 'y'], got 'z'"),
        ((*weights, "--domain", "2"), "domains are 0 to 1, got 2"),
        ((*weights, "--format", "tflite"), "invalid choice: 'tflite'"),
        ((*weights, "--domain", "y", "--statistics", "minibatch", "--fuse"), "cannot be fused"),
        ((*weights, "--domain", "y", "--example-weight", "2"), "--example-weight: example weights are from 0 to 1"),
        ((*weights, "--domain", "y", "--atol", "-1"), "not written, because its outputs would differ"),
    ):
        assert run(tmp_path, *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "net.pt2").exists()


def test_the_weights_of_a_backbone_are_no_detector(tmp_path, capsys):
    cfg = tiny.config("a:b", tmp_path / "out", MODEL__RETINANET__NUM_CLASSES=2)
    save_config(cfg, tmp_path / "config.yaml")
    torch.save(dn.build_model(cfg).backbone.body.state_dict(), tmp_path / "body.pth")
    assert run(tmp_path, "MODEL.WEIGHTS", tmp_path / "body.pth") == 2
    assert "weights do not fit the model: missing " in capsys.readouterr().err
