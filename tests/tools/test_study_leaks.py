"""tools/studies/figure8.py: which images are normalized together, and what a row measures."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "studies"))

import figure8
from study_rows import STUDIES


def options(study, row, script):
    found = STUDIES[study].rows[row]
    assert found.config == f"tools/studies/{script}.py"
    return list(found.options)


@pytest.mark.parametrize("row", STUDIES["figure8"].rows)
def test_first_steps_of_figure8(row, tmp_path):
    figure8.main([*options("figure8", row, "figure8"), "--steps", "2", "--count", "8", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    of_batches = set(STUDIES["figure8"].columns) if "gn" not in row else {"population"}
    found = {column for column in STUDIES["figure8"].columns if STUDIES["figure8"].value(results, column) is not None}
    assert found == of_batches
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


def test_figure8_of_photographs(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINNORM_DATA", str(tmp_path / "data"))
    arguments = ["--data", "patches", "--classes", "2", "--steps", "1", "--count", "8", "--out", str(tmp_path / "run")]
    figure8.main(arguments)
    assert (tmp_path / "run" / "results.json").exists()
