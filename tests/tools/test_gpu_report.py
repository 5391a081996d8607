"""tools/gpu_report.py: it runs on a CPU as it would on a GPU, and no step costs another one."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import domainnorm as dn

TOOL = Path(__file__).parents[2] / "tools" / "gpu_report.py"
sys.path.insert(0, str(TOOL.parent))

import gpu_report  # noqa: E402
from benchmarks import table  # noqa: E402
from gpu_checks.waits import MESSAGE, Waits  # noqa: E402
from gpu_report import STEPS, Step  # noqa: E402


@pytest.mark.slow
def test_a_dry_run_passes_every_step(tmp_path):
    command = [sys.executable, TOOL, "--out", tmp_path, "--dry-run"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report, text = read(tmp_path)
    assert [*report["steps"]] == [step.name for step in STEPS] == [line.split()[0] for line in lines_of(ended)]
    for name, step in report["steps"].items():
        assert step["status"] == "passed" and step["rows"] and f"\n## {name}\n" in text
        assert all(math.isfinite(v) for row in step["rows"] for v in row.values() if isinstance(v, float))
    rows = {name: step["rows"] for name, step in report["steps"].items()}
    assert {row["function"] for row in rows["kernels"] if "function" in row} == {
        *("moments", "affine", "sums", "gradient")
    }
    assert {row["detector"] for row in rows["waits"]} == {"RetinaNet", "Mask R-CNN"}
    assert [row["statistics"] for row in rows["quickstart"]] == ["population", "minibatch"]
    assert {row["precision"] for row in rows["head"]} == {"float32", "bfloat16"}
    assert len(rows["tests"]) == 1 and " passed" in rows["tests"][0]["tests"]
    assert "dry run" in text


def lines_of(ended):
    return ended.stdout.splitlines()[:-1]  # the last one says where the report is


def read(folder):
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def step(name, code, seconds=60.0):
    return Step(name, f"what {name} does", seconds, ("-c", code, "{json}"))


WRITE = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'machine': 'm', 'rows': [{'a': 1.5}]})); "
WORKS = step("works", WRITE)
BROKEN = (
    step("fails", WRITE + "print('some output'); raise ValueError('broken')"),
    step("dies", "import os; os.kill(os.getpid(), 9)"),
    step(
        "garbage",
        "import sys; open(sys.argv[1], 'wb').write(bytes(range(256))); sys.stdout.buffer.write(b'x' + bytes([255, 0]))",
    ),
    step("list", "import sys; open(sys.argv[1], 'w').write('[1, 2]')"),
    step("silent", "pass"),
)


def test_a_step_that_fails_costs_no_other(tmp_path, capsys):
    assert gpu_report.main(["--out", str(tmp_path)], [*BROKEN, WORKS]) == 1
    report, text = read(tmp_path)
    status = {name: step["status"] for name, step in report["steps"].items()}
    assert status == {**{step.name: "failed" for step in BROKEN}, "works": "passed"}
    assert report["steps"]["works"]["rows"] == report["steps"]["fails"]["rows"] == [{"a": 1.5}]  # written before
    assert "ValueError: broken" in report["steps"]["fails"]["error"] and "ValueError: broken" in text
    assert report["steps"]["dies"]["exit code"] == -signal.SIGKILL
    assert "some output" in (tmp_path / "fails.log").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[:-1]] == [[*pair] for pair in status.items()]


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path):
    code = (
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '100']); "
        f"{WRITE}open(sys.argv[1] + '.pid', 'w').write(str(child.pid)); time.sleep(100)"
    )
    began = time.monotonic()
    assert gpu_report.main(["--out", str(tmp_path)], [step("hangs", code, seconds=1.5), WORKS]) == 1
    assert time.monotonic() - began < 30
    report, text = read(tmp_path)
    hung = report["steps"]["hangs"]
    assert hung["status"] == "timed out" and hung["rows"] == [{"a": 1.5}] and "| timed out |" in text
    assert 'File "<string>", line 1 in <module>' in hung["error"]  # where it was
    assert report["steps"]["works"]["status"] == "passed"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "hangs.json.pid").read_text()), 0)
            time.sleep(0.1)  # until whoever takes over orphans has seen that it ended


def test_steps_run_again_take_their_places(tmp_path):
    good, bad = WORKS, step("works", "raise ValueError")
    other = step("other", WRITE)
    assert gpu_report.main(["--out", str(tmp_path)], [bad, other]) == 1
    assert gpu_report.main(["--out", str(tmp_path), "--steps", "works"], [good, other]) == 0
    report, _ = read(tmp_path)
    assert {name: step["status"] for name, step in report["steps"].items()} == {"works": "passed", "other": "passed"}
    assert gpu_report.main(["--out", str(tmp_path), "--steps", "other", "--dry-run"], [good, other]) == 0
    report, text = read(tmp_path)
    assert [*report["steps"]] == ["other"] and "dry run" in text  # figures of a GPU are not mixed with others


def test_steps_for_which_no_time_is_left_are_named(tmp_path):
    assert gpu_report.main(["--out", str(tmp_path), "--minutes", "0"], [WORKS]) == 1
    report, text = read(tmp_path)
    assert report["steps"]["works"]["status"] == "skipped" and "no time was left" in text


def test_the_limit_of_a_step_is_what_is_left(tmp_path):
    assert gpu_report.main(["--out", str(tmp_path), "--minutes", "0.2"], [WORKS]) == 0
    report, _ = read(tmp_path)
    assert 5 < report["steps"]["works"]["limit"] <= 12


def test_what_pytest_prints_is_read():
    log = "tests/a.py::one[x-1] PASSED [ 25%]\ntests/a.py::two[a b] FAILED [ 50%]\ntests/a.py::six SKIPPED [ 75%]\n"
    log += "FAILED tests/a.py::two[a b] - AssertionError: 3 apart\n"
    assert gpu_report.tests_of(log) == {
        "rows": [
            {"tests": "1 failed, 1 passed, 1 skipped"},
            {"test": "tests/a.py::two[a b]", "outcome": "failed", "error": "AssertionError: 3 apart"},
        ],
        "summary": "1 failed, 1 passed, 1 skipped",
    }
    ended = gpu_report.tests_of(log + "tests/a.py::hangs[a b] Fatal Python error: Aborted\n")
    assert ended["rows"][-1] == {"test": "tests/a.py::hangs[a b]", "outcome": "never ended", "error": ""}
    assert gpu_report.tests_of("tests/a.py::six SKIPPED [100%]\n") == {"rows": [], "summary": "1 skipped"}
    assert gpu_report.tests_of("no tests ran") == {"rows": [], "summary": "no tests"}


def test_waits_are_counted_by_place():
    names = {}
    code = f"import warnings\ndef wait(): warnings.warn({MESSAGE!r})\ndef warn(): warnings.warn('something else')"
    exec(compile(code, str(Path(dn.__file__).parent / "ops" / "moments.py"), "exec"), names)
    with Waits("cpu") as waits:
        for _ in range(3):
            names["wait"]()
        names["warn"]()
        warnings.warn(MESSAGE, stacklevel=1)
    ours, other = waits.places.items()
    assert ours[0][:2] == ("ours", "domainnorm/ops/moments.py:2 wait") and ours[1] == 3
    assert other[0][0] == "other" and "test_waits_are_counted_by_place" in other[0][1] and other[1] == 1


def test_rows_are_written_as_they_come(tmp_path, capsys):
    def rows():
        yield {"a": 1, "b": 0.5}
        assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [{"a": 1, "b": 0.5}]
        yield {"a": 2, "b": 0.25}
        yield {"c": "x|y"}
        raise ValueError

    with pytest.raises(ValueError):
        table.show(rows(), tmp_path / "rows.json", "a command")
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3
    assert capsys.readouterr().out.splitlines()[2:] == [
        *("| a | b |", "| --- | --- |", "| 1 | 0.5 |", "| 2 | 0.25 |", "", "| c |", "| --- |", "| x/y |")
    ]
