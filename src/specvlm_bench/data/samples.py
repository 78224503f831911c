"""What a sample is, and how what a line or row says becomes one or a problem."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any, TypeVar

from specvlm.core.config import VideoConfig
from specvlm.core.errors import ConfigError

ASK = ("question", "describe")
# The prompt of the authors' code for MVBench, MLVU and LongVideoBench (clip_input_video in their utils/utils.py).
DESCRIBE = (
    "Please provide a detailed description of the video, focusing on the main subjects, their actions, and the "
    "background scenes."
)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sample:
    """One question about one video."""

    id: str  # unique within the data; any text
    video: str | tuple[str, ...]  # what media.load reads: a path or URL, or the files of the frames
    prompt: str
    group: str  # samples of one video share it: intervals are clustered by it
    settings: Mapping[str, Any] = field(default_factory=dict)  # of this sample alone: start and end of the part to read


@dataclass(frozen=True)
class Problem:
    """A sample that the data do not give."""

    where: str  # "questions.jsonl, line 3", "data/test-00000-of-00001.parquet, row 17"
    text: str  # what is wrong and what would help, on one line


@dataclass(frozen=True)
class Data:
    """The samples of a run, and what the data do not give."""

    name: str
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]

    @classmethod
    def of(cls, name: str, samples: Sequence[Sample], problems: Sequence[Problem], limit: int | None) -> Data:
        """Return the data with at most `limit` samples, evenly spread.

        Raises:
            ConfigError: there is no sample.
        """
        if not samples:
            first = f"{problems[0].where}: {problems[0].text}" if problems else "it is empty"
            raise ConfigError(f"{name} gives no sample ({len(problems)} problems); {first}")
        return cls(name, tuple(spread(samples, limit)), tuple(problems))


class Malformed(Exception):
    """A line or row gives no sample; the text says why and what would help."""


@dataclass(frozen=True)
class Row:
    """A line or row as it stands in its file."""

    where: str
    number: int  # from 1
    task: str  # the file's name without its ending
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return a field that must be text.

        Raises:
            Malformed: it is missing, empty or something else.
        """
        value = self.fields.get(name)
        if value is None:
            raise Malformed(f"it has no {name}: give a text")
        if not isinstance(value, str):
            raise Malformed(f"{name} is {shortened(value)}: give a text")
        if not value.strip():
            raise Malformed(f"{name} is empty: give a text")
        if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise Malformed(f"{name} holds half of a surrogate pair, which is no text: give a text")
        return value

    def name(self, name: str) -> str:
        """Return a field that must be text or a whole number.

        Raises:
            Malformed: it is neither.
        """
        value = self.fields.get(name)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if is_number else self.text(name)

    def cut(self) -> dict[str, float]:
        """Return start and end of the part to read, in seconds, as far as they are given.

        Raises:
            Malformed: they are no such times.
        """
        found = {name: self.fields[name] for name in ("start", "end") if self.fields.get(name) is not None}
        try:
            VideoConfig(**found)
        except ConfigError as error:
            raise Malformed(str(error)) from error
        return found


@dataclass(frozen=True)
class Claim:
    """What a row says, before its video is looked for."""

    id: str
    prompt: str
    group: str
    videos: tuple[str, ...]  # paths within the data's folder, of which the first that is there counts; or a URL
    cut: Mapping[str, float] = field(default_factory=dict)
    frame_rate: float | None = None  # of the pictures, where the video is a folder of them
    archives: tuple[str, ...] = ()  # patterns of the files of the hub's repository that hold the video


Placed = tuple[str, _T]  # where it stands, and what is there


def claimed(rows: Iterable[Row | Problem], parse: Callable[[Row], Claim]) -> tuple[list[Placed[Claim]], list[Problem]]:
    """Return what the rows say, and the problems; of several with one id the first stays."""
    claims: list[Placed[Claim]] = []
    problems: list[Problem] = []
    first: dict[str, str] = {}  # id -> where
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            claim = parse(row)
        except Malformed as error:
            problems.append(Problem(row.where, str(error)))
            continue
        if claim.id in first:
            text = f"id {claim.id!r} is that of {first[claim.id]}: give each sample its own"
            problems.append(Problem(row.where, text))
            continue
        first[claim.id] = row.where
        claims.append((row.where, claim))
    return claims, problems


def found(claims: Iterable[Placed[Claim]], folder: str, remedy: str) -> tuple[list[Sample], list[Problem]]:
    """Return the samples whose videos are there (URLs are not looked for), and the others as problems.

    Args:
        claims: what the rows say.
        folder: what their paths are relative to.
        remedy: what helps where a video is missing.
    """
    samples, problems = [], []
    for where, claim in claims:
        try:
            video, settings = _located(claim, folder, remedy)
        except Malformed as error:
            problems.append(Problem(where, str(error)))
        else:
            samples.append(Sample(claim.id, video, claim.prompt, claim.group, settings))
    return samples, problems


def spread(items: Sequence[_T], limit: int | None) -> Sequence[_T]:
    """Return at most `limit` items, evenly spread."""
    if limit is None or limit >= len(items):
        return items
    return [items[place * len(items) // limit] for place in range(limit)]


def _located(claim: Claim, folder: str, remedy: str) -> tuple[str | tuple[str, ...], Mapping[str, float]]:
    """Return what media.load reads, and the settings that belong to it."""
    if _URL.match(claim.videos[0]):
        return claim.videos[0], claim.cut
    for path in (os.path.join(folder, video) for video in claim.videos):
        if os.path.isfile(path):
            return path, claim.cut
        if claim.frame_rate is not None and os.path.isdir(path):
            return _frames(path, claim.frame_rate, claim.cut), {}
    raise Malformed(f"there is no video {os.path.join(folder, claim.videos[0])!r}: {remedy}")


def _frames(folder: str, rate: float, cut: Mapping[str, float]) -> tuple[str, ...]:
    """Return the pictures of a folder that lie within the cut, in the order of their names."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(_PICTURES))
    last = math.ceil(cut["end"] * rate) if "end" in cut else len(names)
    part = names[math.floor(cut.get("start", 0.0) * rate) : last]
    if not part:
        text = f"{len(names)} frames at {rate:g} a second end before {cut.get('start', 0.0):g} s"
        raise Malformed(f"{folder!r} has no frame to show ({text}): give another part")
    return tuple(os.path.join(folder, name) for name in part)
