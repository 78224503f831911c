"""What is going on, on stderr; and what libraries must neither say nor leave behind."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from specvlm.core.errors import Advice, SpecVLMWarning

STAGES = {
    "read": "reading the video",
    "encode": "encoding the frames",
    "prefill": "prefilling the target",
    "prune": "pruning",
    "draft_prefill": "prefilling the draft",
    "calibrate": "timing passes, once",
    "capture": "capturing CUDA graphs, once",
    "decode": "decoding",
}


class Status:
    """One line on stderr that says what is going on; only where stderr is a terminal."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        self._is_live = not is_quiet and sys.stderr.isatty()
        self._shown = ""
        self._told = time.monotonic()

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Put this on the line."""
        text = text[:79]
        if self._is_live and text != self._shown:
            _write(f"\r{text.ljust(len(self._shown))}")
            self._shown = text

    def progress(self, text: str) -> None:
        """Put this on the line; where there is none, write it once a minute, for logs."""
        self.show(text)
        if not (self._is_live or self.is_quiet) and time.monotonic() - self._told >= 60:
            _write(f"specvlm: {text}\n")
            self._told = time.monotonic()

    def clear(self) -> None:
        """Empty the line, before something else is written."""
        if self._shown:
            _write(f"\r{' ' * len(self._shown)}\r")
            self._shown = ""

    def close(self) -> None:
        """Empty the line for good: the same terminal may show the answer from now on."""
        self.clear()
        self._is_live = False

    def stages(self, prefix: str = "") -> Callable[[str], None]:
        """Return an observer of a request's stages."""
        return lambda name: self.show(f"{prefix}{STAGES[name]}...")

    def warn(self, text: str) -> None:
        """Write a warning on a line of its own."""
        if not self.is_quiet:
            self.clear()
            _write(f"specvlm: warning: {' '.join(text.split())}\n")


def _write(text: str) -> None:
    """Write to stderr; what it cannot take is lost, and the answer goes on."""
    with suppress(OSError, ValueError):
        print(text, end="", file=sys.stderr, flush=True)


@contextmanager
def quiet_libraries(status: Status) -> Iterator[None]:
    """Show our own warnings on one line and nobody else's."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, SpecVLMWarning):
            status.warn(message.on_command_line() if isinstance(message, Advice) else str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


@contextmanager
def no_litter() -> Iterator[None]:
    """Take away the empty folder that torch's compiler makes in the temporary folder as soon as it is imported."""
    is_named = "TORCHINDUCTOR_CACHE_DIR" in os.environ  # torch sets it when it makes its own
    try:
        yield
    finally:
        if not is_named and (folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
            with suppress(OSError):  # it holds something
                os.rmdir(folder)
