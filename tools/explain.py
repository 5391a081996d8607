#!/usr/bin/env python
"""Print what an option of a config is, or the options of a section.

    tools/explain.py [KEY]

Without KEY: all options.
"""

import sys
from collections.abc import Sequence

from train_net import Parser

from domainnorm.config import UserError, explain


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake in what the user gave."""
    parser = Parser(description="Explain an option of a config, or the options of a section.", allow_abbrev=False)
    parser.add_argument("key", nargs="?", default="", metavar="KEY", help="such as SOLVER.BASE_LR or MODEL.RETINANET")
    try:
        print(explain(parser.parse_args(argv).key))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
