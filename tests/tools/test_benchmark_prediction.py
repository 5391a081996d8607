"""tools/benchmark.py prediction: what it prints."""

import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
sys.path.insert(0, str(TOOL.parent))

import benchmark  # noqa: E402


@pytest.mark.slow
def test_prints_a_row_for_each_type(capsys):
    benchmark.main(["prediction", "--detectors", "RetinaNet", "--size", "64", "96", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["fast, in"] for row in table] == ["float32", "bfloat16"]
    assert float(table[0]["relative difference"]) < 1e-3 and float(table[1]["relative difference"]) < 0.5
    assert all(float(row["time / evaluate's"]) > 0 < float(row["time / torchvision's"]) for row in table)
