#!/usr/bin/env python
"""Run one check of `tools/gpu_report.py`. Prints a table, and exits with 1 if a row of it did not pass."""

import argparse
import importlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from benchmarks.table import Row, show

CHECKS = ("versions", "kernels", "waits", "quickstart", "statistics", "shuffle")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the check on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: --device cpu")
    failed = []

    def rows() -> Iterator[Row]:
        for row in importlib.import_module(f"gpu_checks.{args.check}").measure(args.device, args.small):
            if row.get("passed") is False:
                failed.append(row)
            yield row

    show(rows(), args.json, shlex.join(["tools/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]))
    for row in failed:
        print("did not pass:", ", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
