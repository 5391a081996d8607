"""Explain a config option, or list the options of a section.

    domainnorm explain [KEY]

Without KEY, it lists all options.
"""

import sys
from collections.abc import Sequence

from ..config import explain
from ..errors import UserError
from . import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake in what the user gave."""
    parser = Parser(description="Explain a config option, or list the options of a section.", allow_abbrev=False)
    parser.add_argument("key", nargs="?", default="", metavar="KEY", help="such as SOLVER.BASE_LR or MODEL.RETINANET")
    try:
        print(explain(parser.parse_args(argv).key))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
