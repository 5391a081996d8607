#!/usr/bin/env python
"""Train the rows of a study side by side, and write its report.

    tools/studies/run.py NAME [--seeds 0 1 2] [--rows ROW …] [--jobs 1] [--work FOLDER]
        [--out docs/studies] [--report-only]

Each row is a config of `configs/studies/`, trained once per seed with `tools/train_net.py`, or a script of this folder;
all have equal budgets. The same command again, also with more seeds, skips finished runs and resumes interrupted ones.
After every run, NAME.json, NAME.md and NAME.png in `--out` have all results so far, including earlier ones.
`--report-only` makes the last two from the JSON file. `--jobs` processes train at a time: choose as many as there are
cores.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from study import Row, Study
from study_report import write_report
from study_rows import STUDIES

from domainnorm.errors import UserError
from domainnorm.output import output_folder, write_json

ROOT = Path(__file__).resolve().parents[2]


def run(study: Study, name: str, seeds: list[int], rows: list[str], jobs: int, work: Path, out: Path) -> None:
    """All rows of one seed, then those of the next: an interruption leaves whole tables."""
    content = read(out / f"{name}.json") or {"results": {}}
    content |= {"command": f"tools/studies/run.py {name} --seeds {' '.join(map(str, seeds))}", "machine": machine()}
    own = [row for row in rows if not study.rows[row].results_of]
    waiting = [(row, seed) for seed in seeds for row in own if str(seed) not in content["results"].get(row, {})]
    count, done, began = len(waiting), 0, time.monotonic()
    running: dict[Future[tuple[dict[str, Any], int | None]], tuple[str, int]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            busy = sum(study.rows[row].processes for row, _ in running.values())
            while (chosen := startable(study, waiting, list(running.values()), jobs - busy)) is not None:
                waiting.remove(chosen)
                row, seed = chosen
                folder = work / name / row / f"seed-{seed}"
                running[pool.submit(train, study.rows[row], folder, seed, work / name)] = chosen
                busy += study.rows[row].processes
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                row, seed = running.pop(future)
                results, seconds = future.result()
                content["results"].setdefault(row, {})[str(seed)] = {"results": results, "cpu_seconds": seconds}
                content["results"] = {r: content["results"][r] for r in study.rows if r in content["results"]}
                output_folder(out, "--out")
                write_json(out / f"{name}.json", content)
                write_report(study, name, content, out)
                done += 1
                left = (time.monotonic() - began) / done * (count - done) / 60
                said = f"[{done}/{count}] {row}, seed {seed}: {study.headline(row, results)}"
                print(f"{said}; {left:.0f} minutes left" if done < count else said, flush=True)


def startable(
    study: Study, waiting: list[tuple[str, int]], running: list[tuple[str, int]], free: int
) -> tuple[str, int] | None:
    """The first run that has a place, and whose weights are there."""
    for row, seed in waiting:
        needs = (study.rows[row].weights_of, seed)
        # one of more processes than there are places gets all of them
        if (study.rows[row].processes <= free or not running) and needs not in waiting and needs not in running:
            return row, seed
    return None


def train(row: Row, folder: Path, seed: int, study: Path) -> tuple[dict[str, Any], int | None]:
    """Run one row, unless its results are there: these, and the CPU seconds that it took, of all its processes.

    Raises:
        UserError: it failed; its log says why.
    """
    found, seconds = folder / "results.json", None
    if not found.exists():
        options = list(map(os.path.expandvars, row.options))
        trained = Path(os.path.normpath(study / row.weights_of / f"seed-{seed}"))
        if row.weights_of and not (trained / "results.json").exists():
            needed = f"tools/studies/run.py {trained.parts[-3]} --rows {trained.parts[-2]} --seeds {seed}"
            raise UserError(f"{trained} has no results: run {needed} first")
        if row.config.endswith(".py"):
            command = [sys.executable, str(ROOT / row.config), *options]
            command += [str(trained)] if row.weights_of else []
            command += ["--seed", str(seed), "--out", str(folder)]
        else:
            command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(ROOT / row.config)]
            command += ["--num-gpus", str(row.processes)] if row.processes > 1 else []
            # --resume also starts, where there is nothing yet
            command += ["--eval-only" if row.weights_of else "--resume", *options]
            command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
            if row.weights_of:
                command += ["MODEL.WEIGHTS", str(trained / "model_final.pth")]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | os.environ
        with open(log, "a", encoding="utf-8") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
        if process.returncode:
            raise UserError(f"{shlex.join(command)} ended with exit code {process.returncode}: {log} says why")
        seconds = round(usage.ru_utime + usage.ru_stime)
    return json.loads(found.read_text(encoding="utf-8")), seconds


def read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def machine() -> str:
    """What the figures are of."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{os.cpu_count()} cores of {name}, one thread a process, torch {torch.__version__.partition('+')[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the rows of a study, and write its report.")
    parser.add_argument("name", choices=sorted(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows to train; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=Path("output/studies"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"), help="folder for the report")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    study = STUDIES[args.name]
    rows = args.rows or list(study.rows)
    try:
        if unknown := [row for row in rows if row not in study.rows]:
            raise UserError(f"--rows take any of {list(study.rows)}, got {unknown[0]!r}")
        if args.jobs < 1:
            raise UserError(f"--jobs takes a positive number, got {args.jobs}")
        if missing := [key for key in study.data if key not in os.environ]:
            raise UserError(f"the study {args.name} needs {missing[0]}: {study.data[missing[0]]}")
        if not args.report_only:
            run(study, args.name, args.seeds, rows, args.jobs, args.work, args.out)
        elif (content := read(args.out / f"{args.name}.json")) is None:
            raise UserError(f"{args.out / args.name}.json is not there: run the study first")
        else:
            write_report(study, args.name, content, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
