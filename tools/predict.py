#!/usr/bin/env python
"""`domainnorm predict` as a file."""

import sys

from domainnorm.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
