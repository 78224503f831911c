"""What a result depends on, and the files that results are written to."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from specvlm.errors import ConfigError
from specvlm.report import versions


def command_line() -> str:
    """Return the command that is running."""
    return "specvlm " + shlex.join(sys.argv[1:])


def provenance(command: str) -> dict[str, Any]:
    """Return what a result depends on: command line, commit and package versions."""
    return {"command": command, "commit": _commit(), "versions": versions()}


def _commit() -> str | None:
    """Return the commit that runs; a copy without its history is told it by SPECVLM_COMMIT."""
    if told := os.environ.get("SPECVLM_COMMIT"):
        return told
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def writable(name: str) -> TextIO:
    """Open a file for results, its folder made where there is none.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        return open(name, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name} cannot be written ({error.strerror}): give another file") from error
