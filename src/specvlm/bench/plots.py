"""Plots of a speed run: ms a token and speedup over visual tokens, stages before the second token, steps and floors."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specvlm.bench.summary import Line, label, measured, passes, speedup
from specvlm.errors import ConfigError

_COLOURS = ("#0f5c8c", "#d9822b", "#3a9a5c", "#8a5fb0", "#b03a48", "#7a7a7a", "#52b0c4", "#c7a83b")
_INK, _PALE, _FLOOR = "#222222", "#d8d8d8", "#b03a48"
_DPI = 150


def check() -> None:
    """Refuse to plot where matplotlib is missing.

    Raises:
        ConfigError: it is; what installs it is named.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError('plots need matplotlib: pip install "specvlm[bench]", or leave --plots out') from error


def draw(lines: Sequence[Line], directory: str) -> list[Path]:
    """Write three PNG files a pair into a folder, made where there is none; return them.

    Raises:
        ConfigError: matplotlib is missing, or the folder cannot be written.
    """
    check()
    folder, written = Path(directory), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pair in dict.fromkeys(line["pair"] for line in measured(lines)):
            part = [line for line in measured(lines) if line["pair"] == pair]
            slug = re.sub(r"[^a-z0-9.]+", "-", pair.lower()).strip("-")
            for name, plot in (("speed", _speed), ("stages", _stages), ("steps", _steps)):
                file = folder / f"{slug}-{name}.png"
                plot(part).savefig(file, dpi=_DPI, facecolor="white")
                written.append(file)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written ({error.strerror}): give another folder") from error
    return written


def _figure(width: float, height: float, columns: int, title: str) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, side by side."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, color=_INK)
    found = figure.subplots(1, columns, squeeze=False)[0]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", color=_PALE, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, list(found)


def _speed(part: Sequence[Line]) -> Any:
    """Draw ms a token and the speedup over this engine's plain decoding, over the visual tokens where they differ."""
    return _over_lengths(part) if len({line["visual_tokens"] for line in part}) > 1 else _at_one_length(part)


def _at_one_length(part: Sequence[Line]) -> Any:
    figure, axes = _bars(f"{part[0]['pair']}, {part[0]['visual_tokens']:,} visual tokens", len(part))
    for place, line in enumerate(part):
        ms, gain = line["ms_per_token"]["median"], speedup(line, part)
        axes.barh(place, ms, color=_COLOURS[0], height=0.7)
        text = f" {ms:.1f}" if gain is None else f" {ms:.1f}  ({gain:.2f}x plain)"
        axes.annotate(text, (ms, place), va="center", fontsize=8)
    axes.set_yticks(range(len(part)), _rows(part), fontsize=8)
    axes.set(xlabel="ms a token", xlim=(0, 1.2 * max(line["ms_per_token"]["median"] for line in part)))
    return figure


def _over_lengths(part: Sequence[Line]) -> Any:
    figure, (times, gains) = _figure(11, 4.5, 2, part[0]["pair"])
    names = list(dict.fromkeys(map(label, part)))
    for place, name in enumerate(names):
        mine = sorted((line for line in part if label(line) == name), key=lambda line: int(line["visual_tokens"]))
        lengths = [line["visual_tokens"] for line in mine]
        style = {"color": _COLOURS[place % len(_COLOURS)], "marker": "o", "markersize": 4, "label": name,
                 "linestyle": "-" if place < len(_COLOURS) else "--"}  # fmt: skip
        times.plot(lengths, [line["ms_per_token"]["median"] for line in mine], **style)
        ratios = [(line["visual_tokens"], speedup(line, part)) for line in mine]
        known = [(length, ratio) for length, ratio in ratios if ratio is not None]
        gains.plot([length for length, _ in known], [ratio for _, ratio in known], **style)
    for axes, text in ((times, "ms a token"), (gains, "times faster than plain decoding")):
        axes.set(xlabel="visual tokens", ylabel=text, ylim=(0, None))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    times.legend(fontsize=8, frameon=False)
    return figure


def _rows(part: Sequence[Line]) -> list[str]:
    """Return a label a line, with its visual tokens where they differ."""
    several = len({line["visual_tokens"] for line in part}) > 1
    return [f"{label(line)}, {line['visual_tokens']:,}" if several else label(line) for line in part]


def _bars(title: str, count: int) -> tuple[Any, Any]:
    """Return a figure for `count` horizontal bars."""
    figure, [axes] = _figure(9, 1.6 + 0.32 * count, 1, title)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure, axes


def _stages(part: Sequence[Line]) -> Any:
    """Draw the seconds before the second token, a bar a line, stacked by stage."""
    figure, axes = _bars(f"{part[0]['pair']}: seconds before the second token", len(part))
    names = list(dict.fromkeys(stage for line in part for stage in line["ttft_s"]))
    left = [0.0] * len(part)
    for place, stage in enumerate(names):
        seconds = [line["ttft_s"].get(stage, 0.0) for line in part]
        axes.barh(range(len(part)), seconds, left=left, color=_COLOURS[place % len(_COLOURS)], label=stage, height=0.7)
        left = [sum(pair) for pair in zip(left, seconds, strict=True)]
    axes.set_yticks(range(len(part)), _rows(part), fontsize=8)
    axes.set_xlabel("seconds")
    axes.legend(fontsize=8, frameon=False)
    return figure


def _steps(part: Sequence[Line]) -> Any:
    """Draw each kind of step, with a mark where its floor is."""
    bars = [
        (f"{name}, {step['rows']} rows: {row}", step)
        for line, row in zip(part, _rows(part), strict=True)
        for name, step in line["steps"].items()
    ]
    for length in dict.fromkeys(line["visual_tokens"] for line in part):
        alone = passes([line for line in part if line["visual_tokens"] == length])
        bars += [(f"{name}, {step['rows']} rows, {length:,}", step) for name, found in alone.items() for step in found]
    figure, axes = _bars(f"{part[0]['pair']}: single steps and their memory-bandwidth floor", len(bars))
    axes.barh(range(len(bars)), [step["ms"] for _, step in bars], color=_COLOURS[0], height=0.6, label="measured")
    for place, (_, step) in enumerate(bars):
        mark = "floor" if place == 0 else None
        axes.plot([step["floor_ms"]] * 2, [place - 0.4, place + 0.4], color=_FLOOR, linewidth=2.5, label=mark)
        axes.annotate(f" {step['ms'] / step['floor_ms']:.2f}x", (step["ms"], place), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_xlabel("ms")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure
