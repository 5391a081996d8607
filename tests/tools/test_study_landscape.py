"""tools/studies/landscape.py: the loss along the gradient is that of the weights there, and nothing else changes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import domainnorm as dn
from domainnorm.data import patches

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import landscape

CONFIG = Path(__file__).parents[2] / "configs" / "studies" / "landscape" / "simplenet.yaml"
SMALL = ["MODEL.BACKBONE.NAME", "simplenet_8", "SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "3"]


@pytest.fixture
def few_images(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(patches, "COUNTS", {"patches_train": 16, "patches_val": 4})


def test_a_parabola():
    model = nn.Linear(1, 1, bias=False).double()
    loss = lambda: 0.5 * model.weight.square().sum()  # noqa: E731
    loss().backward()
    weight = model.weight.item()
    found = landscape.losses_along_gradient(loss, model, [0.0, 0.5, 1.0, 3.0])
    assert found == pytest.approx([0.5 * weight**2 * (1 - rate) ** 2 for rate in (0.0, 0.5, 1.0, 3.0)])
    assert model.weight.item() == weight


def test_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), dn.DomainBatchNorm(4), nn.Dropout()).train()
    x = torch.randn(8, 4)
    model(x).square().mean().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first, second = landscape.losses_along_gradient(lambda: model(x).square().mean(), model, [0.1, 0.1])
    assert first == second  # the same elements are dropped
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_training(few_images, tmp_path):
    """It is what it would have been; at the rate of a step, the loss is that of its images after it."""
    losses = []

    class After(dn.HookBase):
        def before_train(self):
            self.trainer.model.register_forward_pre_hook(self.keep)

        def keep(self, model, batch):
            self.batch = batch

        def after_step(self):
            with torch.no_grad():
                losses.append(float(self.trainer.model(*self.batch)["loss_cls"]))

    watch = landscape.Landscape([0.5, 1.0], every=2)
    options = [*SMALL, "MODEL.BACKBONE.NORM", "", "SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.WEIGHT_DECAY_BIAS", "0.0"]
    trained = [
        dn.train(dn.load_config(str(CONFIG), [*options, "OUTPUT_DIR", f"{tmp_path}/{k}"]), hooks=hooks).state_dict()
        for k, hooks in enumerate(([watch, After()], []))
    ]
    assert list(watch.losses) == [0, 2]
    assert [values[1] for values in watch.losses.values()] == pytest.approx(losses[::2], rel=1e-5)
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_the_tool(few_images, tmp_path):
    arguments = ["--config-file", str(CONFIG), "--factors", "1", "2", "--every", "2", "--out", str(tmp_path / "out")]
    assert landscape.main([*arguments, "--seed", "1", *SMALL]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["smallest"]) == list(results["largest"]) == ["0", "2"]
    assert results["width"]["2"] == results["largest"]["2"] - results["smallest"]["2"] >= 0
    assert results["width"]["second half"] == results["width"]["2"]
    assert (tmp_path / "out" / "landscape.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--every", "0"], "--every takes"), (["SOLVER.ACCUMULATE", "2"], "got SOLVER.ACCUMULATE 2")],
)
def test_mistakes_are_one_line(options, message, tmp_path, capsys):
    assert landscape.main(["--config-file", str(CONFIG), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
