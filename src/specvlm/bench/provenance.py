"""What a result depends on, and the files that results are written to."""

from __future__ import annotations

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
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {"command": command, "commit": commit.stdout.strip() or None, "versions": versions()}


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
