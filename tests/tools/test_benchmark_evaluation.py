"""tools/benchmark.py evaluation: its data set, and what it prints."""

import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
sys.path.insert(0, str(TOOL.parent))

import benchmark  # noqa: E402
from benchmarks import evaluation  # noqa: E402


def test_the_data_set_is_like_coco():
    predictions, truth = evaluation.make_data(images=60, boxes=20)
    assert len(truth["images"]) == 60 and len(predictions) == 60 * 20 and len(truth["categories"]) == 80
    assert 60 * 5 < len(truth["annotations"]) < 60 * 9
    area = np.array([entry["area"] for entry in truth["annotations"]])
    assert min((area < 32**2).mean(), (area > 96**2).mean()) > 0.1
    for entry in predictions[::50]:
        np.testing.assert_allclose(coco_mask.toBbox(entry["segmentation"]), entry["bbox"], rtol=0.1, atol=4)
    for kind in ("bbox", "segm"):
        assert 5 < evaluation.ours(predictions, truth, kind)[0] < 60
    assert evaluation.make_data(images=2, boxes=3) == evaluation.make_data(images=2, boxes=3)


def test_prints_a_row_for_boxes_and_one_for_masks(capsys):
    benchmark.main(["evaluation", "--images", "20", "--boxes", "10", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["kind"] for row in table] == ["bbox", "segm"]
    for row in table:
        assert 0 < float(row["time, ours / plain"]) < 1 and float(row["s, ours"]) < float(row["s, plain"])
        assert float(row["memory, ours / plain"]) >= 0 and row["images"] == "20"


def test_other_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(evaluation, "evaluated", lambda way, *_: ([50.0 + (way == "ours") * 1e-14], 1.0, 1.0))
    with pytest.raises(AssertionError, match="not equal"):
        evaluation.compare(tmp_path, "bbox", 1)
