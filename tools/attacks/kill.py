"""SIGKILL a short training at random moments and resume it until complete: the result must be bitwise the same.

With several processes (--processes 2), either all are killed or one of them; the others must then end by themselves.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from .outcome import Outcomes
from .tiny import MODELS, write_data

TRAIN = Path(__file__).parents[1] / "train_net.py"
PATIENCE = 120  # seconds after which a process that should have ended counts as hanging
KILLS = 3  # of one run, at most; then it may finish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=1, help="number of processes of the training")
    parser.add_argument("--model", choices=MODELS, default="RetinaNet")
    parser.add_argument("--iterations", type=int, default=12)


def attack(args: argparse.Namespace, folder: Path) -> Outcomes:
    """Runs until `args.number` processes, or groups of them, were killed."""
    random, outcomes = Random(args.seed), Outcomes(args.seed)
    options = MODELS[args.model] | {
        "DATASETS.TRAIN": [write_data(args.model, folder / "data", 16)],
        "SOLVER.MAX_ITER": args.iterations,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    }
    start = time.perf_counter()
    _train(folder / "whole", options, args.processes).wait()
    seconds = time.perf_counter() - start  # of an uninterrupted run
    expected = _final(folder / "whole")
    killed, run = 0, 0
    while killed < args.number:
        output = folder / f"run{run}"
        for _ in range(min(random.randint(1, KILLS), args.number - killed)):
            # Most of the time goes into imports: from there on, as often as in the work itself.
            wait = random.uniform(0.3 * seconds, seconds)
            alone = random.random() < 0.5
            outcomes.count(killed, "kills", partial(_kill, output, options, args.processes, wait, alone, random))
            killed += 1
        outcomes.count(run, "runs", partial(_complete, output, options, args.processes, expected))
        run += 1
    return outcomes


def _train(output: Path, options: dict[str, Any], processes: int) -> subprocess.Popen[bytes]:
    output.mkdir(exist_ok=True)
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps(options | {"OUTPUT_DIR": str(output)}), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, str(TRAIN), "--config-file", str(config), "--num-gpus", str(processes), "--resume"]
    paths = [str(TRAIN.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _group(leader: int) -> list[int]:
    """The processes that `leader` started, and itself, which are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, group = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:  # it has ended meanwhile
                continue
            if int(group) == leader and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def _kill(
    output: Path, options: dict[str, Any], processes: int, wait: float, alone: bool, random: Random
) -> str | None:
    """Start training and kill it after `wait` seconds: all processes, or one `alone`. None if it was still running.

    Raises:
        AssertionError: processes that were not killed run on, or a checkpoint cannot be read.
    """
    process = _train(output, options, processes)
    try:
        process.wait(wait)
        return "had finished"
    except subprocess.TimeoutExpired:
        pass
    if processes > 1 and alone:
        os.kill(random.choice(_group(process.pid)), signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        while others := _group(process.pid):
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"{len(others)} processes run on {PATIENCE} s after one was killed")
            time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pointer = output / "last_checkpoint"
    if pointer.exists():
        torch.load(output / pointer.read_text(encoding="utf-8").strip(), weights_only=True)
    return None


def _complete(output: Path, options: dict[str, Any], processes: int, expected: dict[str, Any]) -> str | None:
    """Resume until the end, and compare.

    Raises:
        AssertionError: it does not end well, differs, or left a broken file.
    """
    process = _train(output, options, processes)
    try:
        code = process.wait(2 * PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("hangs") from None
    log = output.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
    assert code == 0, f"exit code {code}: {log[-300:]}"
    different = _different(_final(output), expected)
    assert not different, f"{different} is not that of the uninterrupted run"
    for line in (output / "metrics.json").read_text(encoding="utf-8").splitlines():
        json.loads(line)
    return None


def _final(output: Path) -> dict[str, Any]:
    """The last checkpoint, but for what names its folder."""
    checkpoint: dict[str, Any] = torch.load(output / "model_final.pth", weights_only=True)
    return {key: value for key, value in checkpoint.items() if key in ("model", "optimizer", "scaler", "iteration")}


def _different(one: Any, other: Any, name: str = "checkpoint") -> str:
    """Where two nested values differ in a bit; "" for nowhere."""
    if isinstance(one, torch.Tensor):
        return "" if isinstance(other, torch.Tensor) and torch.equal(one, other) else name
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(filter(None, (_different(one[key], other[key], f"{name}.{key}") for key in one)), "")
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return next(filter(None, (_different(*pair, name) for pair in zip(one, other, strict=True))), "")
    return "" if one == other else name
