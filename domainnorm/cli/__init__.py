"""The command line, `domainnorm COMMAND …`; `domainnorm COMMAND --help` lists the options of a command."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import UserError

# Before torch: by default its CPU threads spin so long for each other that a third busy process on two cores slows a
# step down 8 times; with fewer turns 3 times, and by 5 % where nobody else is busy.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

COMMANDS = {  # the module of each, and the arguments that it begins with
    "train": ("train", []),
    "eval": ("train", ["--eval-only"]),
    "predict": ("predict", []),
    "compare": ("compare", []),
    "export": ("export", []),
    "explain": ("explain", []),
    "show": ("show", []),
    "analyze": ("analyze", []),
    "audit": ("audit", []),
}
USAGE = f"usage: domainnorm {{{','.join(COMMANDS)}}} …   (domainnorm COMMAND --help says more)"


class Parser(argparse.ArgumentParser):
    """Argument parser that reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake in what the user gave."""
    command, *arguments = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        print(f"error: expected a command of {list(COMMANDS)}, got {command!r}", file=sys.stderr)
        return 2
    module, first = COMMANDS[command]
    sys.argv[0] = f"domainnorm {command}"  # what --help calls it
    return importlib.import_module(f".{module}", __name__).main([*first, *arguments])
