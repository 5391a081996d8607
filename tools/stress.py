#!/usr/bin/env python
"""Run many attacks: nothing may be lost, no process may die, and an error that a user can fix must be one line.

    tools/stress.py kill|annotations|configs|checkpoints|layers --number N --seed S [--json FILE]

Prints one line of counts, and each failure with its number, which repeats it with the same seed. The exit code is 1
after a failure. Results are in docs/reliability.md.
"""

import argparse
import importlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.table import machine

COMMANDS = {
    "kill": 20,
    "annotations": 2000,
    "configs": 2000,
    "checkpoints": 300,
    "layers": 2000,
}  # and the default number


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 if an attack succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"attacks.{name}") for name in COMMANDS}
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        command.add_argument("--number", type=int, default=COMMANDS[name], help="number of attacks")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write counts and failures to this file")
        module.add_arguments(command)
    args = parser.parse_args(argv)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        outcomes = modules[args.command].attack(args, Path(folder))
    seconds = time.perf_counter() - start
    print(f"{args.command}: {outcomes.line()}; {seconds:.0f} s")
    for failure in outcomes.failures:
        print(failure, file=sys.stderr)
    if args.json:
        content = {
            "machine": machine(),
            "command": shlex.join(["tools/stress.py", *(sys.argv[1:] if argv is None else argv)]),
            "seconds": round(seconds),
            "counts": outcomes.counts,
            "failures": outcomes.failures,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(bool(outcomes.failures))


if __name__ == "__main__":
    sys.exit(main())
