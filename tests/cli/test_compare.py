"""tools/compare.py: the options that differ, results side by side, curves over each other."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from domainnorm.cli.compare import main
from domainnorm.config import save_config

TOOL = Path(__file__).parents[2] / "tools" / "compare.py"


def write_run(folder, rate, results, curve, **others):
    folder.mkdir(parents=True)
    sets = others.pop("sets", ["val=a.json:b"])
    save_config(
        tiny.config("a.json:b", folder, SOLVER__BASE_LR=rate, DATASETS__TEST=sets, **others), folder / "config.yaml"
    )
    if results:
        (folder / "results.json").write_text(json.dumps(results))
    lines = [{"iteration": k, "total_loss": value} for k, value in curve]
    lines.append({"iteration": 9, "population/bbox/AP": 50.0})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def result(value):
    return {"bbox": {"AP": value, "AP50": 2 * value, "APl": None, "AP-cat": 1.0}}


@pytest.fixture
def runs(tmp_path):
    both = {"population": result(30.0), "minibatch": result(20.5)}
    return [
        write_run(tmp_path / "slow", 0.01, both, [(5, 2.0), (9, 1.0)]),
        write_run(tmp_path / "fast", 0.02, {"population": result(33.0)}, [(5, 3.0)], MODEL__RETINANET__NORM="GN"),
    ]


def test_what_differs_and_what_came_of_it(runs, capsys):
    assert main(runs) == 0
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        *(["Options that differ"], ["option", "slow", "fast"], ["MODEL.RETINANET.NORM", "BN", "GN"]),
        *(["SOLVER.BASE_LR", "0.01", "0.02"], [""], ["Results"]),
        ["data set", "of", "statistics", "run", "AP", "AP50", "APl"],
        ["val", "boxes", "population", "slow", "30.00", "60.00", "-"],
        ["val", "boxes", "population", "fast", "33.00", "66.00", "-"],
        ["val", "boxes", "minibatch", "slow", "20.50", "41.00", "-"],
    ]


def test_several_sets_and_a_run_without_results(tmp_path, capsys):
    sets = ["near=a:b", "far=c:d"]
    several = {"population": {"near": result(1.0), "far": result(2.0), "overall": result(3.0)}}
    folders = [
        write_run(tmp_path / "x" / "run", 0.1, several, [], sets=sets),
        write_run(tmp_path / "y" / "run", 0.1, None, [], sets=sets),
    ]
    assert main(folders) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["option", *folders]  # two folders of one name
    assert [line[:5] for line in lines if "boxes" in line] == [
        [name, "boxes", "population", folders[0], f"{value:.2f}"]
        for name, value in (("far", 2), ("near", 1), ("overall", 3))
    ]


def test_a_page_with_curves(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from domainnorm.visualization import plots

    drawn = []
    png = plots.png
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or png(figure))
    assert main([*runs, "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<h1>Comparison of slow, fast</h1>" in text and "<td class=word>SOLVER.BASE_LR</td>" in text
    assert "<td>33.00</td>" in text and text.count("data:image/png") == 1
    loss, precision = drawn[0].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in loss.lines} == {
        "slow": [[5, 2], [9, 1]],
        "fast": [[5, 3]],
    }
    assert precision.get_title("left") == "population/bbox/AP" and len(precision.lines) == 2


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    def mistake(*argv):
        assert main(list(argv)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "two or more different output folders" in mistake(runs[0])
    assert "two or more different output folders" in mistake(runs[0], runs[0])
    assert "has no config.yaml; give the OUTPUT_DIR of a training" in mistake(runs[0], str(tmp_path))
    (tmp_path / "fast" / "results.json").write_text("{")
    assert "results.json: cannot be read" in mistake(*runs)


@pytest.mark.slow
def test_the_tool_is_the_command(runs):
    done = subprocess.run([sys.executable, TOOL, *runs], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Options that differ") and not done.stderr
