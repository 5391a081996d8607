#!/usr/bin/env python
"""`domainnorm explain` as a file."""

import sys

from domainnorm.cli.explain import main

if __name__ == "__main__":
    sys.exit(main())
