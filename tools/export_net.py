#!/usr/bin/env python
"""`domainnorm export` as a file."""

import sys

from domainnorm.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
