#!/usr/bin/env python
"""Train the rows of a study side by side, and write its report.

    tools/studies/run.py NAME [--seeds 0 1 2] [--rows ROW …] [--work FOLDER] [--out docs/studies] [--report-only]

Each row is a config of `configs/studies/`, trained once for each seed with `tools/train_net.py`, with equal budgets.
What is finished is skipped, what was interrupted goes on: the same command again, or with more seeds. After every run
NAME.json, NAME.md and NAME.png in `--out` have all results so far, also those from before. `--report-only` makes the
two latter from the JSON file.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from study_report import write_report
from study_rows import STUDIES, Row, Study

from domainnorm.errors import UserError
from domainnorm.output import output_folder, write_json

ROOT = Path(__file__).resolve().parents[2]


def run(study: Study, name: str, seeds: list[int], rows: list[str], work: Path, out: Path) -> None:
    """All rows of one seed, then those of the next: an interruption leaves whole tables."""
    file = out / f"{name}.json"
    content = read(file) or {"results": {}}
    content |= {"command": f"tools/studies/run.py {name} --seeds {' '.join(map(str, seeds))}", "machine": machine()}
    todo = [(seed, row) for seed in seeds for row in rows]
    for number, (seed, row) in enumerate(todo, start=1):
        own = content["results"].setdefault(row, {})
        if str(seed) in own:
            continue
        folder = work / name / row / f"seed-{seed}"
        began = time.monotonic()
        print(f"[{number}/{len(todo)}] {row}, seed {seed} …", end=" ", flush=True)
        results = train(study.rows[row], folder, seed, work / name)
        own[str(seed)] = {"results": results, "seconds": round(time.monotonic() - began)}
        content["results"] = {r: content["results"][r] for r in study.rows if r in content["results"]}
        output_folder(out, "--out")
        write_json(file, content)
        write_report(study, name, content, out)
        print(f"{own[str(seed)]['seconds']} s, {study.headline(results)}", flush=True)


def train(row: Row, folder: Path, seed: int, study: Path) -> dict[str, Any]:
    """Run one row, unless its results are there.

    Raises:
        UserError: it failed; its log says why.
    """
    found = folder / "results.json"
    if not found.exists():
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(ROOT / row.config)]
        command += ["--num-gpus", str(row.processes)] if row.processes > 1 else []
        options = [*map(os.path.expandvars, row.options), "SEED", str(seed), "OUTPUT_DIR", str(folder)]
        if row.weights_of:
            options += ["MODEL.WEIGHTS", str(study / row.weights_of / f"seed-{seed}" / "model_final.pth")]
            command.append("--eval-only")
        else:
            command.append("--resume")  # or start, where there is nothing yet
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | os.environ
        with open(log, "a", encoding="utf-8") as stream:
            code = subprocess.run(
                [*command, *options], stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        if code:
            raise UserError(f"{shlex.join(command)} ended with exit code {code}: {log} says why")
    return json.loads(found.read_text(encoding="utf-8"))


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
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="some of them; all by default")
    parser.add_argument("--work", type=Path, default=Path("output/studies"), help="for the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"), help="for the report")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    study = STUDIES[args.name]
    rows = args.rows or list(study.rows)
    try:
        if unknown := [row for row in rows if row not in study.rows]:
            raise UserError(f"--rows take any of {list(study.rows)}, got {unknown[0]!r}")
        if missing := [key for key in study.data if key not in os.environ]:
            raise UserError(f"the study {args.name} needs {missing[0]}: {study.data[missing[0]]}")
        if not args.report_only:
            run(study, args.name, args.seeds, rows, args.work, args.out)
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
