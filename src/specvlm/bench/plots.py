"""Plots of a speed run: ms a token and speedup over visual tokens, stages before the second token, steps and floors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specvlm.bench import style
from specvlm.bench.summary import Line, label, measured, passes, speedup
from specvlm.errors import ConfigError

_FLOOR = style.COLOURS[4]


def check() -> None:
    """Refuse to plot where matplotlib is missing.

    Raises:
        ConfigError: it is; what installs it is named.
    """
    style.require_matplotlib("plots need", ", or leave --plots out")


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
                plot(part).savefig(file, dpi=style.DPI, facecolor="white")
                written.append(file)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written ({error.strerror}): give another folder") from error
    return written


def _speed(part: Sequence[Line]) -> Any:
    """Draw ms a token and the speedup over this engine's plain decoding, over the visual tokens where they differ."""
    return _over_lengths(part) if len({line["visual_tokens"] for line in part}) > 1 else _at_one_length(part)


def _at_one_length(part: Sequence[Line]) -> Any:
    figure, axes = style.bars(f"{part[0]['pair']}, {part[0]['visual_tokens']:,} visual tokens", len(part))
    for place, line in enumerate(part):
        ms, gain = line["ms_per_token"]["median"], speedup(line, part)
        axes.barh(place, ms, color=style.COLOURS[0], height=0.7)
        text = f" {ms:.1f}" if gain is None else f" {ms:.1f}  ({gain:.2f}x plain)"
        axes.annotate(text, (ms, place), va="center", fontsize=8)
    axes.set_yticks(range(len(part)), _rows(part), fontsize=8)
    axes.set(xlabel="ms a token", xlim=(0, 1.2 * max(line["ms_per_token"]["median"] for line in part)))
    return figure


def _over_lengths(part: Sequence[Line]) -> Any:
    figure, (times, gains) = style.figure(11, 4.5, 2, part[0]["pair"])
    names = list(dict.fromkeys(map(label, part)))
    for place, name in enumerate(names):
        mine = sorted((line for line in part if label(line) == name), key=lambda line: int(line["visual_tokens"]))
        lengths = [line["visual_tokens"] for line in mine]
        look = style.line(place) | {"label": name}
        times.plot(lengths, [line["ms_per_token"]["median"] for line in mine], **look)
        ratios = [(line["visual_tokens"], speedup(line, part)) for line in mine]
        known = [(length, ratio) for length, ratio in ratios if ratio is not None]
        gains.plot([length for length, _ in known], [ratio for _, ratio in known], **look)
    for axes, text in ((times, "ms a token"), (gains, "times faster than plain decoding")):
        axes.set(xlabel="visual tokens", ylabel=text, ylim=(0, None))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    times.legend(fontsize=8, frameon=False)
    return figure


def _rows(part: Sequence[Line]) -> list[str]:
    """Return a label a line, with its visual tokens where they differ."""
    several = len({line["visual_tokens"] for line in part}) > 1
    return [f"{label(line)}, {line['visual_tokens']:,}" if several else label(line) for line in part]


def _stages(part: Sequence[Line]) -> Any:
    """Draw the seconds before the second token, a bar a line, stacked by stage."""
    figure, axes = style.bars(f"{part[0]['pair']}: seconds before the second token", len(part))
    names = list(dict.fromkeys(stage for line in part for stage in line["ttft_s"]))
    style.stacked(axes, {name: [line["ttft_s"].get(name, 0.0) for line in part] for name in names})
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
    figure, axes = style.bars(f"{part[0]['pair']}: single steps and their memory-bandwidth floor", len(bars))
    axes.barh(range(len(bars)), [step["ms"] for _, step in bars], color=style.COLOURS[0], height=0.6, label="measured")
    for place, (_, step) in enumerate(bars):
        mark = "floor" if place == 0 else None
        axes.plot([step["floor_ms"]] * 2, [place - 0.4, place + 0.4], color=_FLOOR, linewidth=2.5, label=mark)
        axes.annotate(f" {step['ms'] / step['floor_ms']:.2f}x", (step["ms"], place), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_xlabel("ms")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure
