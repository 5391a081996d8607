"""tools/studies/figure8.py and contrastive.py: which images are normalized together, and what a row measures."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import contrastive
import figure8
from rows_classifiers import FIGURE_8
from study_rows import STUDIES


def options(study, row, script):
    found = STUDIES[study].rows[row]
    assert found.config == f"tools/studies/{script}.py"
    return list(found.options)


@pytest.mark.parametrize("row", STUDIES["figure8"].rows)
def test_first_steps_of_figure8(row, tmp_path):
    figure8.main([*options("figure8", row, "figure8"), "--steps", "2", "--count", "8", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    found = {column for column in FIGURE_8 if STUDIES["figure8"].value(row, results, column) is not None}
    assert found == ({"population"} if "gn" in row else set(FIGURE_8))
    assert list(results["steps"]) == ["1", "2"] and 0 < results["final"]["population"] < 50


def test_normalization_batches_of_few_classes():
    labels = figure8.patterns()[0][1]
    (chosen,) = itertools.islice(figure8.minibatches(labels, 8, "few_classes", 8, 0), 1)
    counts = [torch.unique(part, return_counts=True)[1].tolist() for part in labels[chosen].split(32)]
    assert counts == 8 * [8 * [4]]
    (chosen,) = itertools.islice(figure8.minibatches(labels, 8, "few_classes_in_rounds", 8, 0), 1)
    assert all(len(set(part.tolist())) == 8 for part in labels[chosen].split(8))


def test_an_image_has_a_fainter_one_of_another_class():
    data = figure8.patterns()[0]
    chosen = torch.arange(64)
    x, y = figure8.mixed(data, chosen, torch.Generator().manual_seed(0))
    assert y.tolist() == list(range(64))
    similarity = x @ data[0][:64].T / 16  # to the image of each class, of norm 4
    own = similarity.diagonal()
    others = (similarity - 9 * torch.eye(64)).amax(1)
    assert own.mean() == pytest.approx(1, abs=0.1) and others.mean() == pytest.approx(figure8.FAINT, abs=0.1)
    assert 0.5 < (own > others).float().mean() < 1


@pytest.mark.parametrize("row", ["2x16", "ghost", "gn"])
def test_figure8_of_photographs(row, tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    given = options("figure8_fashion", row, "figure8")
    assert given[:2] == ["--data", "$FASHION_MNIST"]
    figure8.main(["--data", "patches", *given[2:], "--steps", "1", "--count", "8", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert STUDIES["figure8_fashion"].value(row, results, "population") > 15  # of four classes


@pytest.mark.parametrize("row", STUDIES["contrastive"].rows)
def test_first_steps_of_contrastive(row, tmp_path, monkeypatch):
    """On one process, which has eight normalization batches."""
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    few = ["--data", "patches", "--images", "500", "--processes", "1", "--steps", "20"]
    contrastive.main([*options("contrastive", row, "contrastive"), *few, "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    study = STUDIES["contrastive"]
    found = {column: study.value(row, results, column) for column in study.columns}
    assert all(value is not None and 0 <= value <= 100 for value in found.values())
    assert found["linear"] > 25  # of four classes


@pytest.mark.slow
def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    given = ["--data", "patches", "--images", "500", "--steps", "2", "--out", str(tmp_path / "run")]
    contrastive.main([*options("contrastive", "shuffled", "contrastive"), *given])
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 4


def test_the_key_is_that_of_the_same_image():
    """Of views of real content; a score of 1 over the temperature is that of equal vectors."""
    images = F.interpolate(torch.randn(32, 1, 3, 3), 14)
    one = contrastive.view(images, torch.Generator().manual_seed(0))
    assert one.shape == images.shape and not torch.equal(one, images)
    assert torch.equal(one, contrastive.view(images, torch.Generator().manual_seed(0)))
    vectors = F.normalize(images.flatten(1), dim=1)
    logits = contrastive.scores(vectors, vectors, vectors[:4])
    assert logits.shape == (32, 5) and torch.allclose(logits[:, 0], torch.tensor(1 / contrastive.TEMPERATURE))


def test_the_key_encoder_follows():
    query, key = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    query(torch.randn(8, 2))
    with torch.no_grad():
        query.weight.fill_(2.0)
    contrastive.follow(key, query, buffers=False)
    assert torch.allclose(key.weight, torch.full((2,), 2 - contrastive.MOMENTUM)) and not key.running_mean.any()
    contrastive.follow(key, query, buffers=True)
    assert torch.allclose(key.running_mean, (1 - contrastive.MOMENTUM) * query.running_mean)
    assert key.num_batches_tracked == 1
