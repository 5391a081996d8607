#!/usr/bin/env python
"""Compare what domainnorm and its peers cost: ratios of times, memory, bytes and calls, measured side by side.

    tools/benchmark.py COMMAND [--threads N] [--json FILE] …

Prints a table, and writes it to FILE with `--json`. Results are in docs/performance.md.
"""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.table import show

from domainnorm.errors import UserError

COMMANDS = ("layers", "head", "model", "prediction", "annotations", "evaluation", "memory", "shuffle", "collectives")
# glibc gives tensors above 32 MB back to the system when they are freed, and every new one costs a page fault per 4 kB,
# more than what is measured. A GPU's allocator keeps them, and so does this, from the start of a process on; one arena,
# because gloo's threads allocate, too.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_ARENA_MAX": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in COMMANDS}
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        command.add_argument(
            "--threads", type=int, default=1, help="threads of each process; 0: as many as there are cores"
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
        module.add_arguments(command)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of processes started here
    try:
        show(modules[args.command].measure(args), args.json, shlex.join(["tools/benchmark.py", *sys.argv[1:]]))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    main()
