#!/usr/bin/env python
"""`domainnorm train` as a file."""

import sys

from domainnorm.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
