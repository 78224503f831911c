"""`python -m specvlm`, and the program `specvlm`, are the command line."""

from __future__ import annotations

from specvlm.cli.interrupts import leave_on_interrupt

TYPE_CHECKING = False  # as in typing, which is imported once Ctrl-C is a line
if TYPE_CHECKING:
    from typing import NoReturn


def run() -> NoReturn:
    """Run the command line and leave with its exit status."""
    leave_on_interrupt()
    import sys

    from specvlm.cli.main import main

    sys.exit(main())


if __name__ == "__main__":
    run()
