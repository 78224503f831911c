"""What a result depends on, and the files that results are written to."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from specvlm.core.errors import ConfigError


def command_line() -> str:
    """Return the command that is running."""
    return "specvlm " + shlex.join(sys.argv[1:])


def provenance(command: str) -> dict[str, Any]:
    """Return what a result depends on: command line, commit and package versions."""
    from specvlm.engine.account import versions

    return {"command": command, "commit": _commit(), "versions": versions()}


def _commit() -> str | None:
    """Return the commit that runs, marked where the package was changed; SPECVLM_COMMIT tells it to a bare copy."""
    if told := os.environ.get("SPECVLM_COMMIT"):
        return told
    here = Path(__file__)

    def git(*command: str) -> str:
        run = ["git", "-C", str(here.parent), *command]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else this package only lies within somebody else's history
        is_changed = bool(git("status", "--porcelain", "--", str(here.parents[1])))
        return git("rev-parse", "HEAD") + ("-changed" if is_changed else "")
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


class Result(Protocol):
    """What is written as a line."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        ...


def written(results: Iterable[Result], out: str | None) -> Iterator[dict[str, Any]]:
    """Yield results as plain JSON types, each written to `out` as a line before the next is asked for.

    Args:
        results: made as they are asked for.
        out: the file; None writes nothing.

    Raises:
        ConfigError: `out` cannot be written; found before the first result is asked for.
    """
    file = writable(out) if out else None
    try:
        for result in results:
            content = result.to_dict()
            if file:
                print(json.dumps(content), file=file, flush=True)
            yield content
    finally:
        if file:
            file.close()
