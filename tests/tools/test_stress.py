"""tools/stress.py: each attack runs, counts, and would notice what it looks for."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "stress.py"
sys.path.insert(0, str(TOOL.parent))

from attacks import kill, tiny  # noqa: E402
from attacks.outcome import Outcomes, in_child, refusal  # noqa: E402

import domainnorm as dn  # noqa: E402


def result(command, *words, folder):
    """Of the tool as a command: its attacks fork, which a process with threads must not."""
    file = folder / "result.json"
    run = subprocess.run(
        [sys.executable, str(TOOL), command, *words, "--seed", "1", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(TOOL.parents[1])},
    )
    content = json.loads(file.read_text())
    assert run.returncode == (1 if content["failures"] else 0), run.stderr
    (line,) = run.stdout.splitlines()
    assert line.startswith(f"{command}: ") and all(kind in line for kind in content["counts"])
    assert content["command"].startswith(f"tools/stress.py {command} --number") and "torch" in content["machine"]
    return content["counts"]


@pytest.mark.slow
def test_every_attack_runs(tmp_path):
    assert result("annotations", "--number", "20", folder=tmp_path).keys() == {"annotation files"}
    assert sum(result("layers", "--number", "5", folder=tmp_path)["layers"].values()) == 5
    counts = result("configs", "--number", "20", "--build", "2", "--train", "2", folder=tmp_path)
    assert {kind: sum(of.values()) for kind, of in counts.items()} == {
        **{"overrides": 10, "files": 10},
        **{"models": 2, "trainings": 2},
    }
    assert sum(sum(of.values()) for of in result("checkpoints", "--number", "3", folder=tmp_path).values()) == 3
    counts = result("kill", "--number", "1", "--iterations", "4", "--model", "Classifier", folder=tmp_path)
    assert counts["runs"] == {"went_well": 1, "refused": 0, "failed": 0}


def test_what_is_counted():
    outcomes = Outcomes(seed=3)

    def raises(error):
        raise error

    def dies():
        os.kill(os.getpid(), signal.SIGKILL)

    outcomes.count(0, "a", lambda: None)
    outcomes.count(1, "a", lambda: in_child(lambda: "a line"))
    outcomes.count(2, "a", lambda: raises(KeyError("x")))
    outcomes.count(3, "a", lambda: in_child(lambda: raises(KeyError("x"))))
    outcomes.count(4, "b", lambda: in_child(dies))
    outcomes.count(5, "b", lambda: refusal(ValueError("two\nlines"), 0.0))
    assert outcomes.line() == "4 a: 1 went well, 1 refused, 2 failed; 2 b: 0 went well, 0 refused, 2 failed"
    assert [failure["number"] for failure in outcomes.failures] == [2, 3, 4, 5]
    assert "KeyError: 'x'" in outcomes.failures[1]["error"] and "died: -9" in outcomes.failures[2]["error"]


def test_a_difference_of_one_bit_is_noticed():
    one = {"model": {"w": torch.ones(3)}, "optimizer": [{"lr": 0.1}, (1, 2)]}
    other = {"model": {"w": torch.ones(3)}, "optimizer": [{"lr": 0.1}, (1, 2)]}
    assert kill._different(one, other) == ""
    other["model"]["w"][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert kill._different(one, other) == "checkpoint.model.w"
    assert kill._different({"a": [1, 2]}, {"a": [1, 3]}) and kill._different({"a": 1}, {"b": 1})


@pytest.mark.parametrize("model", tiny.MODELS)
def test_the_models_are_tiny(tmp_path, model):
    cfg = dn.load_config(
        None, tiny.words(tiny.MODELS[model] | {"DATASETS.TRAIN": [tiny.write_data(model, tmp_path / "d")]})
    )
    assert sum(parameter.numel() for parameter in dn.build_model(cfg).parameters()) < 2e6
