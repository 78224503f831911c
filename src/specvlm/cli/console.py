"""What a program may meet at its edges: closed descriptors, narrow encodings, a reader that goes away, signals."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from specvlm.cli.interrupts import leave
from specvlm.core.errors import ConfigError, one_line

_LONGEST_WORD = 400  # a number of 5,000 digits is no message
_NOT_WRITTEN = {
    errno.EPIPE: "stdout was closed before all was written: read it to its end",
    errno.ENOSPC: "no space left on the device: free some, or write elsewhere",
    errno.EBADF: "stdout cannot be written to: open it for writing, or write to a file",
}


class Terminated(BaseException):
    """The program was asked to end by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number  # as a shell reports it


def prepare_streams() -> None:
    """Let every text be written: what the encoding lacks is escaped, and a closed stderr swallows it.

    Raises:
        ConfigError: stdout is closed, so that no answer could be written.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for the rest of the process
    if sys.stdout is None:
        raise ConfigError("stdout is closed: open it, or write to a file (> FILE)")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """Write a line to stderr, if it can be written."""
    with suppress(OSError, ValueError):
        words = (word if len(word) <= _LONGEST_WORD else f"{word[:60]}..." for word in message.split())
        print(f"specvlm: {' '.join(words)}", file=sys.stderr, flush=True)


def not_written(error: OSError) -> str:
    """Return what an error of the system means for the reader; what stdout still holds is dropped if it cannot go."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # the flush at exit would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _NOT_WRITTEN.get(error.errno or 0) or one_line(error)


def raise_on_signals() -> None:
    """Let Ctrl-C, a request to end and a closed terminal become exceptions, so that nothing is left behind.

    Signals that this process was told to ignore stay ignored; in a thread other than the main one nothing changes.
    """
    with suppress(ValueError):
        if signal.getsignal(signal.SIGINT) is leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _terminate)


def restore_signals() -> None:
    """Let the signals that end a program do so again, where `raise_on_signals` had its way."""
    with suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is _terminate:
                signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    raise Terminated(number)
