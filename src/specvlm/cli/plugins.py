"""Commands and data sets that other packages bring, found by their entry points; the bench's come so."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from specvlm.core.errors import ConfigError, one_line

COMMANDS = "specvlm.commands"  # each adds its commands to the command line's subparsers
DATA = "specvlm.data"  # each reads samples: (name, directory, ask=, limit=) -> what has `samples` and `problems`


@cache
def load(group: str) -> tuple[Any, ...]:
    """Return what the installed packages bring, in the order of their names.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    found = {(entry.name, entry.value): entry for entry in entry_points(group=group)}
    return tuple(_load(found[place]) for place in sorted(found))


def _load(entry: Any) -> Any:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        text = f"the plug-in {entry.name!r} ({entry.value}) cannot be imported: {one_line(error)}"
        raise ConfigError(f"{text}; uninstall or mend it") from error
