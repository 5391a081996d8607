#!/usr/bin/env python
"""`domainnorm analyze` as a file."""

import sys

from domainnorm.cli.analyze import main

if __name__ == "__main__":
    sys.exit(main())
