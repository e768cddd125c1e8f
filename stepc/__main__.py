"""`python -m stepc` is `stepc`."""

import sys

from stepc.cli import main

sys.exit(main())
