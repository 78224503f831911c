"""`python -m specvlm` is the command line."""

import sys

from specvlm.cli import main

sys.exit(main())
