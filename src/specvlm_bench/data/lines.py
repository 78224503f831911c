"""A JSONL of samples: a line {"video", "prompt", "id"} each, and start and end of a part, in seconds, where wanted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from specvlm.core.config import VideoConfig
from specvlm.core.errors import ConfigError
from specvlm_bench.data.samples import Claim, Data, Malformed, Problem, Row, claimed, found


def read_lines(
    name: str, file: Path, *, video: str = "video", prompt: str | None = None, limit: int | None = None
) -> Data:
    """Return the samples of a JSONL. A video is a URL, or a path relative to the file's folder.

    Args:
        name: what the data are called.
        file: the JSONL.
        video: the field that names the video.
        prompt: what lines without a prompt ask; None makes such a line a problem.
        limit: at most so many samples.

    Raises:
        ConfigError: the file cannot be read, or gives no sample.
    """

    def parse(row: Row) -> Claim:
        _check_keys(row)
        asked = row.text("prompt") if prompt is None or "prompt" in row.fields else prompt
        path = row.text(video)
        return Claim(row.name("id"), asked, os.path.normpath(path) if "://" not in path else path, (path,), row.cut())

    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): give a JSONL of {{video, prompt, id}}") from error
    claims, problems = claimed(_rows(file, content), parse)
    samples, missing = found(claims, str(file.parent), f"give its path from {file.parent}, or a URL")
    return Data.of(name, samples, [*problems, *missing], limit)


def _check_keys(row: Row) -> None:
    """Raise Malformed where a line sets what of its video only a run can; other keys are the user's own business."""
    of_videos = {field.name for field in fields(VideoConfig)} - {"start", "end"}
    if wrong := sorted(row.fields.keys() & of_videos):
        raise Malformed(f"{wrong[0]} is a setting of the whole run, not of a line: give it as an option")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys are all different.

    Raises:
        ValueError: they are not; JSON would take the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} stands there twice")
    return found


def _rows(file: Path, content: bytes) -> Iterator[Row | Problem]:
    """Yield the lines that are not blank. Only a line feed ends one: JSON's texts may hold every other separator."""
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{file.name}, line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            yield Problem(where, f"it is no JSON ({error}): write one object {{video, prompt, id}} a line")
            continue
        if isinstance(fields, dict):
            yield Row(where, number, file.stem, fields)
        else:
            yield Problem(where, f"it is no object but {type(fields).__name__}: write {{video, prompt, id}}")
