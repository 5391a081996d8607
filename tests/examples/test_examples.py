"""The examples run, and do what they say."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import domainnorm as dn
from domainnorm.data import shapes

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_attack_stays_near_and_finds_a_larger_loss():
    attacked = example("adversarial_training").attacked
    model = nn.Sequential(nn.Conv2d(3, 4, 3), dn.BatchGroupNorm(4, num_groups=2), nn.Flatten(), nn.Linear(4 * 36, 3))
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 3
    model.train()(images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moved = attacked(model, images, labels, 5)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (moved - images).abs().max() <= 8 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    loss = nn.CrossEntropyLoss(reduction="none")
    model.eval()
    assert (loss(model(moved), labels) > loss(model(images), labels)).all()


@pytest.mark.slow
def test_adversarial_training():
    found = example("adversarial_training").main(["--steps", "60", "--images", "400", "--attack", "2"])
    assert found["clean"] > 30 and found["attacked"] <= found["clean"]


@pytest.mark.parametrize("norm", ["BGN", "BN"])
def test_few_shots(norm):
    few_shots = example("prototypical_network")
    options = ["--norm", norm, "--ways", "3", "--noise", "0.5", "--tests", "30"]
    trained = few_shots.main([*options, "--episodes", "40"])
    assert min(trained.values()) > 60  # of 33.3 by chance


def test_classes_of_waves_are_the_same_in_every_image():
    waves, generator = example("prototypical_network").waves, torch.Generator().manual_seed(0)
    images = waves(torch.tensor([3, 7]), 4, 0.0, generator)
    spectra = torch.fft.fft2(images).abs()
    assert torch.allclose(spectra[:, 0], spectra[:, 1], rtol=0.3, atol=30)
    assert not torch.allclose(spectra[0, 0], spectra[1, 0], rtol=0.3, atol=30)


@pytest.mark.slow
def test_own_model(tmp_path, capsys):
    found = example("own_model").main(["--iterations", "2", "--out", str(tmp_path / "out")])
    assert found.keys() == {"population", "minibatch"} and all(0 <= value <= 100 for value in found.values())
    assert "training 1" in capsys.readouterr().out
    assert "norm_of_class_weights" in (tmp_path / "out" / "metrics.json").read_text()


@pytest.mark.slow
def test_audit_foreign_model(tmp_path, capsys):
    found = example("audit_foreign_model").main(["--steps", "2", "--out", str(tmp_path / "out")])
    assert found.keys() == {"before", "after"} and all(0 <= value <= 100 for value in found.values())
    assert "with population statistics of each level" in capsys.readouterr().out


@pytest.mark.slow
def test_adapt_domain(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 8, "val": 4})
    run = ["SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run")]
    dn.train(dn.load_config(str(EXAMPLES.parent / "configs" / "quickstart.yaml"), run))
    found = example("adapt_domain").main([str(tmp_path / "run"), "--images", "3", "--out", str(tmp_path / "out")])
    assert found.keys() == {"minibatch", "source", "target", "nearest"}
    assert all(set(scores) == {"shapes_val", "shapes_night_val"} for scores in found.values())
    assert "the image itself" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()).keys() == found.keys()


def test_level_statistics(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 8, "val": 2})
    run, level_statistics = tmp_path / "run", example("level_statistics")
    cfg = dn.load_config(str(EXAMPLES.parent / "configs" / "quickstart.yaml"), ["MODEL.DEVICE", "cpu"])
    run.mkdir()
    (run / "config.yaml").write_text(cfg.dump())
    torch.save({"model": dn.build_model(cfg).state_dict()}, run / "model_final.pth")
    levels = level_statistics.level_features(run, "classification_head.conv.1.1", images=2)
    assert [level.shape[0] for level in levels] == [64] * 5
    assert [level.shape[1] for level in levels[:2]] == [2 * 16 * 20, 2 * 8 * 10]
    shifted = [torch.randn(4, 1000) * (1 + k) + k for k in range(3)]
    lines = level_statistics.draw(shifted).axes[1].get_lines()
    heights = [line.get_ydata()[0] for line in lines if (line.get_color(), line.get_marker()) == ("C2", "o")]
    together = torch.cat(shifted, 1)
    expected = ((2 - together.mean(1)) / together.std(1)).abs().mean()
    assert heights == [pytest.approx(float(expected), abs=0.1)]
    level_statistics.main([str(run), "--images", "1", "--out", str(tmp_path / "levels.png")])
    assert (tmp_path / "levels.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match=r"--layer takes any of .*got 'conv'"):
        level_statistics.level_features(run, "conv", 1)


def test_a_head_that_knows_its_levels_is_the_same_with_the_same_statistics():
    audit_foreign_model = example("audit_foreign_model")
    torch.manual_seed(0)
    model, images = audit_foreign_model.fcos().eval(), [torch.rand(3, 128, 128), torch.rand(3, 100, 128)]
    with torch.no_grad():
        expected = model(images)
        model.head = audit_foreign_model.HeadOfLevels(model.head)
        found = model.eval()(images)
    for one, other in zip(found, expected, strict=True):
        for key, value in one.items():
            torch.testing.assert_close(value, other[key])
