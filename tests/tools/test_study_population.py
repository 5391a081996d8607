"""tools/studies/population.py: every column of the study has a figure, and its parts compute what they say."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import domainnorm as dn

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import population
import population_time
from study_rows import STUDIES


def run(monkeypatch, folder, *options):
    arguments = ["--data", "patches", "--images", "64", "--batch", "16", "--epochs", "2", "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", ["population.py", *arguments, *options])
    monkeypatch.setattr(population, "VALIDATION", 32)
    monkeypatch.setattr(population, "BATCHES", (2, 10, 100, 1000))
    population.main()
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_every_column_has_a_figure(monkeypatch, tmp_path):
    results = run(monkeypatch, tmp_path, "--norm-batch", "4")
    study = STUDIES["population"]
    late = {column for column in study.columns if ", epoch " in column and int(column.split()[-1]) > 2}
    missing = {column for column in study.columns if study.value("nbs_4", results, column) is None} - late
    assert missing == {"time of pooled", "time of exact", "time of layer by layer"}
    assert len(set(study.columns.values())) == len(study.columns)
    assert run(monkeypatch, tmp_path, "--norm-batch", "4") == results  # seeded


def test_the_ema_of_one_process():
    """The first groups of two steps, by the formula of the EMA."""
    torch.manual_seed(0)
    model = population.make_model(3, 2)
    first = population.norms(model)[0]
    images = torch.randn(2, 8, 1, 14, 14)
    mean, var = torch.zeros(16), torch.ones(16)
    for batch in images:
        features = model[0](batch[:2])
        mean = 0.9 * mean + 0.1 * features.mean((0, 2, 3))
        var = 0.9 * var + 0.1 * features.var((0, 2, 3))
        model.train()(batch)
    model.eval()(images[0])  # does not count
    twin = population.norms(population.of_one_process(model))[0]
    torch.testing.assert_close(twin.running_mean, mean)
    torch.testing.assert_close(twin.running_var, var)
    assert not torch.equal(first.running_mean, mean)


def test_minibatch_statistics_are_of_groups_of_the_training():
    torch.manual_seed(0)
    model = population.make_model(3, 2)
    images, labels = torch.randn(8, 1, 14, 14), torch.arange(8) % 3
    dn.set_statistics(model.eval(), "minibatch")
    predicted = torch.cat([model(pair) for pair in images.split(2)]).argmax(1)
    dn.set_statistics(model, "auto")
    found = population.error(model, (images, labels), "minibatch")
    assert found == pytest.approx(100 * float((predicted != labels).float().mean()))
    assert model.training


def test_a_frozen_copy_goes_on_from_the_same_weights():
    torch.manual_seed(0)
    training = population.Training(population.make_model(3, 2), 0.1, steps=10)
    images, labels = torch.randn(8, 1, 14, 14), torch.arange(8) % 3
    training.step(0, images, labels)
    frozen = training.frozen(images)
    statistics = {name: value.clone() for name, value in frozen.model.named_buffers()}
    for own, other in zip(training.model.parameters(), frozen.model.parameters(), strict=True):
        assert torch.equal(own, other) and own is not other
    frozen.step(1, images, labels)
    assert all(torch.equal(value, statistics[name]) for name, value in frozen.model.named_buffers())
    assert not torch.equal(frozen.model[0].weight, training.model[0].weight)


def test_exact_layer_by_layer():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    model.append(torch.nn.Conv2d(4, 4, 3)).append(torch.nn.BatchNorm2d(4))
    batches = list(torch.randn(8, 3, 8, 8).split(2))
    twin = dn.recompute_population_statistics(copy.deepcopy(model), batches, method="exact", progress=False)
    population_time.layer_by_layer(model, batches)
    torch.testing.assert_close(model[4].running_mean, twin[4].running_mean)
    torch.testing.assert_close(model[4].running_var, twin[4].running_var * 127 / 128)
    assert set(population_time.measure(model, batches, repeats=1)) == {"pooled", "exact", "layer by layer"}
