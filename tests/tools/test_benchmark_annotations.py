"""tools/benchmark.py annotations: the file that it writes, and what it prints."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import benchmark
from benchmarks import annotations


def test_both_ways_find_what_was_written(tmp_path):
    objects = annotations.write_file(tmp_path / "a.json", images=40)
    assert 200 < objects < 400 and objects == annotations.write_file(tmp_path / "b.json", images=40)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    found = [annotations.plain(tmp_path / "a.json"), *(annotations.ours(tmp_path / "a.json", m) for m in (False, True))]
    assert found == [(40, objects)] * 3


@pytest.mark.slow
def test_a_row_for_boxes_and_one_for_masks(capsys):
    benchmark.main(["annotations", "--images", "50", "--repeats", "1"])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split("|")[1].strip() for row in rows] == ["bbox", "segm"]
    for row in rows:
        assert all(float(cell) >= 0 for cell in row.strip("|").split("|")[1:])
