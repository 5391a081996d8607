#!/usr/bin/env python
"""`domainnorm compare` as a file."""

import sys

from domainnorm.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
