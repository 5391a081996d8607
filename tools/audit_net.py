#!/usr/bin/env python
"""`domainnorm audit` as a file."""

import sys

from domainnorm.cli.audit import main

if __name__ == "__main__":
    sys.exit(main())
