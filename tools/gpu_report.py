#!/usr/bin/env python
"""Run everything that needs a GPU, in one command and a few minutes: tests, checks, benchmarks, the quickstart.

    tools/gpu_report.py --out FOLDER [--minutes 8] [--steps NAME …] [--dry-run]

Each step runs in its own process, with a time limit. After each, FOLDER/report.md and report.json are rewritten, so
that a step that fails, hangs or kills its process costs no other step. Its output is in FOLDER/NAME.log. Steps rerun
with --steps replace their results in the existing report. The exit code is 0 if all requested steps have passed.

--dry-run does the same on a CPU with tiny sizes, only to check that the command runs.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_checks.markdown import render

ROOT = Path(__file__).resolve().parent.parent
LEAST = 5  # seconds that a step must have left to be started
TAIL = 40  # lines of a log that the report shows
MOST = 2**22  # bytes of a log that are read


@dataclass(frozen=True)
class Step:
    """A command, and how it is run.

    Attributes:
        name: of the step, of its log and of its rows.
        title: what it answers, for the report.
        seconds: its limit.
        words: the command after `python`; "{device}" and "{json}" stand for the device and for the file of its rows.
        small: words that are added with `--dry-run`.
    """

    name: str
    title: str
    seconds: float
    words: Sequence[str]
    small: Sequence[str] = ()


def _check(name: str, title: str, seconds: float) -> Step:
    return Step(name, title, seconds, ("tools/gpu_check.py", name, *_PLACES), ("--small",))


def _benchmark(name: str, title: str, seconds: float, words: str, small: str) -> Step:
    return Step(name, title, seconds, ("tools/benchmark.py", name, *_PLACES, *shlex.split(words)), shlex.split(small))


_PLACES = ("--device", "{device}", "--json", "{json}")
_TESTS = (
    "-m pytest -o addopts= tests/test_gpu.py -m gpu -vv --tb short -p no:cacheprovider --durations 10 --device {device}"
)
# The cheap ones first: if time runs out, it is the measurements that are cut short.
STEPS = (
    _check("versions", "Versions and card", 60),
    _check("kernels", "Functions of segments against their formulas; which backends the layers took", 90),
    _check("shuffle", "RoI shuffle and collectives in a process group of one", 60),
    _check("statistics", "Exact population statistics, with waiting batches out of the device's memory", 60),
    _check("waits", "Where a training step waits", 75),
    Step("tests", "`pytest -m gpu`", 150, _TESTS.split(), ("-k", "not trace or SeqNorm")),
    _benchmark(
        "head",
        "One norm over five pyramid levels, 800 by 1333, against its peers",
        75,
        "--dtype float32 bfloat16 --repeats 15",
        "--size 64 96 --channels 8 --no-compile --repeats 1",
    ),
    _benchmark("memory", "Memory of the layers", 45, "", "--shape 4 32 64 64 --layers GhostBN --layouts NCHW"),
    _benchmark(
        "model",
        "Detectors at 800 by 1333 beside torchvision's",
        90,
        "--size 800 1333",
        "--size 64 64 --detectors RetinaNet --precisions float32 --repeats 1",
    ),
    _check("quickstart", "The quickstart", 120),
    _benchmark(
        "layers",
        "The layers beside nn.BatchNorm2d and their textbook versions",
        90,
        "--repeats 9",
        "--shapes 8x16x6x6 --layers BN GhostBN 'example weighing' --repeats 1",
    ),
)


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time limit for all steps; the last ones are cut short"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=[step.name for step in steps], metavar="NAME", help="run only these steps"
    )
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, with tiny sizes")
    args = parser.parse_args(argv)

    deadline = time.monotonic() + 60 * args.minutes
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    report = _read(args.out, args.dry_run)
    report["command"] = shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    passed = True
    for step in steps:
        if args.steps and step.name not in args.steps:
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            result: dict[str, Any] = {
                "title": step.title,
                "status": "skipped",
                "summary": "no time was left",
                "rows": [],
            }
        else:
            result = run(step, args.out, min(step.seconds, left), args.dry_run)
        passed &= result["status"] == "passed"
        report["steps"][step.name] = result
        report["steps"] = {s.name: report["steps"][s.name] for s in steps if s.name in report["steps"]}
        _write(args.out, report)
        print(
            f"{step.name:<12}{result['status']:<10}{result.get('seconds', 0):6.1f} s  {result.get('summary', '')}",
            flush=True,
        )
    print(f"report: {args.out / 'report.md'}")
    return int(not passed)


def run(step: Step, folder: Path, seconds: float, dry_run: bool) -> dict[str, Any]:
    """What came of a step, within its limit."""
    log, rows = folder / f"{step.name}.log", folder / f"{step.name}.json"
    rows.unlink(missing_ok=True)
    places = {"{device}": "cpu" if dry_run else "cuda", "{json}": str(rows)}
    words = [places.get(word, word) for word in (*step.words, *(step.small if dry_run else ()))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "COLUMNS": "200",  # pytest cuts messages to it
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
            process.send_signal(signal.SIGABRT)  # the fault handler prints where each thread is
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
        finally:
            _kill_group(process)
    with log.open("rb") as stream:
        stream.seek(max(log.stat().st_size - MOST, 0))
        text = stream.read().decode("utf-8", errors="replace")
    found = _rows(rows) if step.name != "tests" else tests_of(text)
    result: dict[str, Any] = {
        "title": step.title,
        "status": status,
        "seconds": time.monotonic() - began,
        "limit": seconds,
        "exit code": process.returncode,
        "command": shlex.join(["python", *words]),
        **found,
    }
    if status != "passed":
        result["error"] = "\n".join(text.splitlines()[-TAIL:])
    elif not found["rows"]:
        result |= {"status": "failed", "error": "it ended without an error, and without a result"}
    return result


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
        process.wait(10)


def _rows(file: Path) -> dict[str, Any]:
    """The rows that a step wrote, and their number in words."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in content["rows"] if isinstance(row, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return {"rows": [], "summary": "no rows"}
    refused = sum(row.get("passed") is False for row in rows)
    summary = f"{len(rows)} rows" + (f", {refused} did not pass" if refused else "")
    return {"rows": rows, "machine": str(content.get("machine", "")), "summary": summary}


def tests_of(log: str) -> dict[str, Any]:
    """Tests that did not pass, and the number of all, of what pytest printed as they ran."""
    run = re.findall(r"^(\S+\.py::.+?) ?(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*| *(?:Fatal .*)?)$", log, re.M)
    errors = dict(re.findall(r"^(?:FAILED|ERROR) (\S+\.py::.+?) - (.*)$", log, re.M))
    counts = Counter(outcome.lower() for _, outcome in run if outcome)
    summary = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no tests"
    # tests that are all skipped, because there is no GPU, are no result
    rows: list[dict[str, Any]] = [{"tests": summary}] if counts.keys() - {"skipped"} else []
    for test, outcome in run:
        if outcome in ("FAILED", "ERROR"):
            rows.append({"test": test, "outcome": outcome.lower(), "error": errors.get(test, "")})
    if run and not run[-1][1]:
        rows.append({"test": run[-1][0], "outcome": "never ended", "error": ""})
    return {"rows": rows, "summary": summary}


def _read(folder: Path, dry_run: bool) -> dict[str, Any]:
    """The report that is there, if it is one of the same kind."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if report["dry run"] == dry_run and isinstance(report["steps"], dict):
            return report
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"dry run": dry_run, "steps": {}}


def _write(folder: Path, report: dict[str, Any]) -> None:
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.md", render(report))):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


if __name__ == "__main__":
    # A step that hangs is aborted, to show where it is: it leaves no core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends this ends the running step, too
    sys.exit(main())
