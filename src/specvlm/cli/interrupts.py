"""Ctrl-C while a program starts: one line, whatever is being imported. So this imports next to nothing itself."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # as in typing, which takes 10 ms to import
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

INTERRUPTED = 130  # the exit status


def leave_on_interrupt() -> None:
    """Let Ctrl-C end the program at once, in one line: while libraries load, an exception could end up anywhere.

    A process that was told to ignore it goes on doing so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)


def leave(_: int, __: FrameType | None) -> NoReturn:
    """Say so and end the process."""
    try:
        os.write(2, b"specvlm: interrupted\n")
    finally:
        os._exit(INTERRUPTED)
