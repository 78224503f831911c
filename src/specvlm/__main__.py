"""`python -m specvlm`, and the program `specvlm`, are the command line."""

import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line and leave with its exit status."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        from specvlm.console import leave_on_interrupt

        leave_on_interrupt()
    from specvlm.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
