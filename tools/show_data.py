#!/usr/bin/env python
"""`domainnorm show` as a file."""

import sys

from domainnorm.cli.show import main

if __name__ == "__main__":
    sys.exit(main())
