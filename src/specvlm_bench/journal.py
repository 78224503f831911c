"""The journal of a quality run, DIR/answers.jsonl: appended to, one object a line, never rewritten.

    {"kind": "run", "command", "commit", "versions", ..., "methods": {name: settings}}    first, and once a restart
    {"kind": "problem", "where", "text"}                  a sample that the data do not give: its line and why
    {"kind": "answer", "sample", "method", "video", ...}  one a sample and method, see quality.Answer
    {"kind": "failure", "sample", "method", "text"}       in the place of an answer
    {"kind": "difference", "sample", "method", ...}       where an answer parts from plain decoding's, see quality
    {"kind": "overlay", "sample", "method", "file", ...}  a picture of what was kept, its path relative to DIR

A line that a killed run left unfinished is cut off when the run goes on; what it was about is then done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from specvlm.core.errors import ConfigError, one_line

NAME = "answers.jsonl"
PLAIN = "plain"  # the method that every other is compared with
_FREE = ("kind", "command", "started", "num_overlays")  # what a restart may have otherwise: no answer depends on it

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a journal holds."""

    directory: Path
    origin: Line  # the first line: what ran, on what, with which settings
    lines: tuple[Line, ...]  # all others

    def of_kind(self, kind: str) -> list[Line]:
        """Return the lines of one kind, in their order."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def answers(self) -> dict[tuple[str, str], Line]:
        """The answers, {(sample, method): line}."""
        return {(line["sample"], line["method"]): line for line in self.of_kind("answer")}


def file_in(directory: Path) -> Path:
    """Return a folder's journal.

    Raises:
        ConfigError: it cannot be read.
    """
    file = directory / NAME
    try:
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): give the --out of bench quality") from error
    return file


def read(directory: Path) -> Run:
    """Return what a folder's journal holds; a last line without its end is left out.

    Raises:
        ConfigError: there is none, or a line of it is no line of a journal; the line is named.
    """
    file = file_in(directory)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} cannot be read (it is no text): give the --out of bench quality") from error
    lines: list[Line] = []
    for number, content in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            line = json.loads(content)
            lines.append({"kind": line["kind"]} | line)
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{file}, line {number} is no line of bench quality ({content[:60]})"
            raise ConfigError(f"{problem}: give the --out of bench quality") from error
    if not lines or lines[0]["kind"] != "run":
        raise ConfigError(f"{file} does not begin with a line of kind run: give the --out of bench quality")
    return Run(directory, lines[0], tuple(lines[1:]))


class Journal:
    """A journal that is written to, by one process at a time.

    Args:
        directory: made where there is none.
        origin: the line of kind "run". Where the folder holds a run already, it goes on if the two agree.

    `lines` are those that it holds, but those of kind "run".

    Raises:
        ConfigError: the folder cannot be written, another process writes there, or it holds another run.
    """

    def __init__(self, directory: Path, origin: Mapping[str, Any]) -> None:
        self.directory = directory
        self._lock = _locked(directory / NAME)
        self._file = (directory / NAME).open("a+", encoding="utf-8")
        try:
            self.lines = self._begin({"kind": "run", **origin})
        except BaseException:
            self.close()
            raise

    def _begin(self, origin: Line) -> list[Line]:
        """Return the lines that are there already, and add the run's."""
        known: list[Line] = []
        content = (self.directory / NAME).read_bytes()
        if content and not _is_torn_start(content):
            run = read(self.directory)
            _check_same(run.origin, json.loads(json.dumps(origin)), self.directory)
            known = [line for line in run.lines if line["kind"] != "run"]
        self._file.truncate(content.rfind(b"\n") + 1)
        self._append(origin)
        return known

    def close(self) -> None:
        """Let another process write there."""
        self._file.close()
        self._lock.release()

    def write(self, line: Line) -> None:
        """Add a line; it is on the disk when this returns."""
        self._append(line)
        self.lines.append(line)

    def _append(self, line: Line) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _locked(path: Path) -> BaseFileLock:
    """Return the lock of a journal, held; the file beside it stays there, as locks do."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another folder") from error
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"{path} is being written by another run: wait for it, or give another folder") from error
    except (OSError, NotImplementedError) as error:
        problem = f"{path} cannot be locked ({one_line(error)})"
        raise ConfigError(f"{problem}: give a folder on a local disk") from error
    return lock


def _is_torn_start(content: bytes) -> bool:
    """Whether this is a run's first line without its end, and no file of somebody else's."""
    return b"\n" not in content and content.startswith(b'{"kind": "run"')


def _check_same(old: Line, new: Line, directory: Path) -> None:
    """Refuse to go on with a run that another configuration, machine or version began."""
    for name in sorted(old.keys() | new.keys()):
        one, other = old.get(name), new.get(name)
        if name in _FREE or one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            part = next(part for part in [*one, *other] if one.get(part, ...) != other.get(part, ...))
            name, one, other = f"{name}, {part}", one.get(part), other.get(part)
        problem = f"{directory} holds another run, whose {name} is {_short(one)} and not {_short(other)}"
        raise ConfigError(f"{problem}: give another folder")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
