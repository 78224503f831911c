"""The names that come with this package, so that a wrong one on a command line is answered without torch.

What is registered is read off the files that register it, which are not run; a test holds both against each other.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

DRAFTERS = {"model": True, "self": True, "lookup": False, "none": False}  # whether they see what a pruner keeps
POLICIES = ("auto", "fixed")
QUANTS = ("fp8", "int8", "int4")  # weight-only formats of a draft
DTYPES = ("float32", "bfloat16", "float16")


@cache
def pruners() -> tuple[str, ...]:
    """Return the names of the pruners."""
    return _registered("prune", "pruner")


def _registered(room: str, decorator: str) -> tuple[str, ...]:
    """Return the names under which the files of a room register something."""
    files = (Path(__file__).parents[1] / room).glob("*.py")
    line = re.compile(rf'^@{decorator}\("(\w+)"', re.MULTILINE)
    return tuple(sorted(name for file in files for name in line.findall(file.read_text(encoding="utf-8"))))
