"""`python -m colonnade.launcher`: the command line."""

import sys

from colonnade.launcher.cli import main

sys.exit(main())
