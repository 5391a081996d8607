"""What a model costs, against fvcore's counts and by hand; the tool."""

import warnings

import pytest
import tiny
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from domainnorm.cli import main
from domainnorm.config import save_config
from domainnorm.engine.analyze import costs, seconds_per_image
from domainnorm.engine.describe import describe_normalization, normalization_batches
from domainnorm.modeling import build_model


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set", count=3)


def test_by_hand():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.fc = nn.Linear(8, 5)
            self.fc.bias.requires_grad_(False)

        def forward(self, images):
            return self.fc(self.body(torch.stack(images)).flatten(1))

    parts = {part.name: part for part in costs(Model().eval(), [torch.rand(3, 10, 10), torch.rand(3, 10, 20)])}
    assert parts.keys() == {"", "body.0", "fc"}
    assert parts["body.0"].multiply_adds == 3 * 8 * 9 * 150 and parts["body.0"].parameters == 3 * 8 * 9
    assert (parts["fc"].multiply_adds, parts["fc"].parameters, parts["fc"].trained) == (40, 45, 40)
    assert parts[""].multiply_adds == parts["body.0"].multiply_adds + 40 and parts[""].parameters == 216 + 45


def test_a_detector_as_fvcore_counts_it(data_set, tmp_path):
    model = build_model(tiny.config(data_set, tmp_path)).eval()
    parts = {part.name: part for part in costs(model, [torch.rand(3, 64, 64)])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = FlopCountAnalysis(model.backbone, torch.rand(1, 3, 64, 64)).unsupported_ops_warnings(False)
        by_operator = counts.by_operator()
    backbone = parts["backbone.body"].multiply_adds + parts["backbone.fpn"].multiply_adds
    assert backbone == by_operator["conv"] + by_operator["linear"]
    locations = sum(side * side for side in (8, 4, 2, 1, 1))
    assert parts["head.classification_head"].multiply_adds == locations * (8 * 8 * 9 + 8 * 9 * 9 * 2)
    assert parts["head.regression_head"].multiply_adds == locations * (8 * 8 * 9 + 8 * 9 * 9 * 4)
    assert parts[""].multiply_adds == sum(part.multiply_adds for name, part in parts.items() if name)
    assert parts[""].parameters == sum(p.numel() for p in model.parameters())


def test_seconds_are_of_one_image():
    calls = []

    class Slow(nn.Module):
        def forward(self, images):
            assert len(images) == 1
            calls.append(images[0])

    assert 0 < seconds_per_image(Slow(), [torch.rand(3, 4, 4)] * 5, warm_up=2) < 0.1
    assert len(calls) == 7


def test_the_table_of_norms_is_the_line_of_the_log(data_set, tmp_path):
    cfg = tiny.config(data_set, tmp_path)
    model = build_model(cfg)
    rows = normalization_batches(cfg, model)
    assert [part for part, _, _ in rows][-2:] == ["head.classification_head", "head.regression_head"]
    assert rows[-1] == ("head.regression_head", 1, "4 images x height x width of each level, of one process")
    line = describe_normalization(cfg, model)
    assert all(f"{part} x{layers}: {text}" in line for part, layers, text in rows)


def run(tmp_path, data_set, *words):
    file = tmp_path / "a.yaml"
    save_config(tiny.config(data_set, tmp_path), file)
    return main(["analyze", "--config-file", str(file), *words])


def test_the_tool(data_set, tmp_path, capsys):
    assert run(tmp_path, data_set, "DATASETS.TEST", f"[{data_set}]", "--number", "2") == 0
    out = capsys.readouterr().out
    assert f"RetinaNet, 2 images of {data_set}, 64 x 64 pixels" in out
    for word in ("backbone.fpn", "10^9 multiply-adds", "100.0 %", "ms (median", "of each level, of one process"):
        assert word in out
    assert run(tmp_path, data_set, "--size", "64", "96", "--number", "1") == 0
    assert "1 images of noise, 64 x 96 pixels" in capsys.readouterr().out
    assert run(tmp_path, data_set, "--size", "0", "96") == 2
    assert capsys.readouterr().err == "error: --size takes numbers from 1 on, got 0\n"


def test_the_tool_with_domains_and_a_model_without_norms(data_set, tmp_path, capsys):
    words = ["DATASETS.DOMAINS", "[day]", "MODEL.NORM_DOMAINS", "dataset", "--size", "64", "64", "--number", "1"]
    assert run(tmp_path, data_set, *words) == 0
    capsys.readouterr()
    none = ["MODEL.BACKBONE.NORM", "", "MODEL.RETINANET.NORM", "", "--size", "64", "64", "--number", "1"]
    assert run(tmp_path, data_set, *none) == 0
    assert capsys.readouterr().out.endswith("no norms\n")
