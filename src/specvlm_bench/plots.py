"""Plots of speed runs, a pair each: ms a token, seconds before the second token, single passes beside their floor.

Bars are sorted, the shortest on top. One that is far longer than the others is cut, marked, and keeps its number.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specvlm.core.errors import ConfigError
from specvlm_bench import style
from specvlm_bench.summary import Line, compared, is_peer, measured, passes, speedup, words

_OWN, _PLAIN, _PEER, _FLOOR = style.COLOURS[0], style.COLOURS[5], style.GREY, style.COLOURS[4]
_FAR = 8  # times the median, from which on a bar is cut
_CUT = 1.15  # times the longest whole bar, where a cut one ends
_PANELS = 2  # numbers of visual tokens that have bars each; more are lines over them
_VISIBLE = 0.002  # of the longest bar, below which a stage is not seen
_STAGES = {  # in the order in which they come
    "read": "read the video",
    "encode": "vision",
    "encode_prefill": "vision and prefill",
    "prefill": "prefill",
    "prune": "choose tokens",
    "draft_prefill": "draft: vision and prefill",
}


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
            part = [line for line in compared(lines) if line["pair"] == pair]
            slug = re.sub(r"[^a-z0-9.]+", "-", pair.lower()).strip("-")
            for name, figure in (("speed", _speed(part, lines)), ("stages", _stages(part)), ("steps", _steps(part))):
                file = folder / f"{slug}-{name}.png"
                figure.savefig(file, dpi=style.DPI, facecolor="white")
                written.append(file)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written ({error.strerror}): give another folder") from error
    return written


# What is drawn


def _names(part: Sequence[Line]) -> list[str]:
    """Return each line in words, with the share of the video where that differs."""
    several = len({line["keep_ratio"] for line in part} - {None}) > 1
    return [words(line, keep_ratio=several) for line in part]


def _panels(part: Sequence[Line]) -> dict[int, list[Line]]:
    """Return the lines by their number of visual tokens."""
    lengths = sorted({line["visual_tokens"] for line in part})
    return {length: [line for line in part if line["visual_tokens"] == length] for length in lengths}


def _title(part: Sequence[Line], what: str) -> str:
    """Return what is shown of which pair; how much the draft saw, where that is the same everywhere."""
    target, _, draft = part[0]["pair"].partition("/")
    ratios = {line["keep_ratio"] for line in part} - {None}
    seen = f" that sees {ratios.pop():.0%} of the video" if len(ratios) == 1 else ""
    return f"{target} with a {draft} draft{seen}: {what}" if draft else f"{target}: {what}"


def _figure(part: Sequence[Line], what: str, counts: Mapping[int, int]) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, a panel for each number of visual tokens, with so many bars."""
    figure, every = style.bars(_title(part, what), *counts.values())
    for axes, (length, count) in zip(every, counts.items(), strict=True):
        axes.set_title(f"{length:,} visual tokens", fontsize=9)
        axes.set_ylim(count - 0.4, -0.6)
    every[-1].set_xlabel(what)
    return figure, every


def _legend(figure: Any, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)


def _sorted(part: Sequence[Line], lengths: Sequence[float]) -> tuple[list[Line], list[float]]:
    """Return lines and the lengths of their bars, the shortest first."""
    order = sorted(range(len(part)), key=lambda place: lengths[place])
    return [part[place] for place in order], [lengths[place] for place in order]


# ms a token


def _speed(part: Sequence[Line], lines: Sequence[Line]) -> Any:
    """Draw ms a token and the speedup over plain decoding, which is among all lines; by length, where many differ."""
    panels = _panels(part)
    if len(panels) > _PANELS:
        return _over_lengths(part, lines)
    figure, every = _figure(part, "milliseconds a token", {length: len(mine) for length, mine in panels.items()})
    end = _end([line["ms_per_token"]["median"] for line in part])
    for axes, mine in zip(every, panels.values(), strict=True):
        shown, times = _sorted(mine, [line["ms_per_token"]["median"] for line in mine])
        for place, (line, ms) in enumerate(zip(shown, times, strict=True)):
            _bar(axes, place, ms, end, _colour(line))
            axes.annotate(_figures(ms, speedup(line, lines)), (min(ms, end), place), va="center", fontsize=8)
        axes.set_yticks(range(len(shown)), _names(shown), fontsize=8)
        axes.set_xlim(0, 1.25 * min(end, max(line["ms_per_token"]["median"] for line in part)))
    every[-1].set_xlabel("milliseconds a token (in brackets: times as fast as specvlm's plain decoding)")
    return figure


def _figures(ms: float, gain: float | None) -> str:
    time = f" {ms:.2f}" if ms < 10 else f" {ms:.1f}"
    return time if gain is None else f"{time}  ({gain:.2f}x)"


def _colour(line: Line) -> str:
    if is_peer(line):
        return _PEER
    return _PLAIN if line["method"] == "plain" else _OWN


def _end(lengths: Sequence[float]) -> float:
    """Return where bars end that are far longer than the others."""
    far = _FAR * statistics.median(lengths)
    is_far = max(lengths) > far
    return _CUT * max(length for length in lengths if length <= far) if is_far else max(lengths)


def _bar(axes: Any, place: int, length: float, end: float, colour: str) -> None:
    """Draw a bar; one that goes beyond the end is cut there, with two strokes across it."""
    axes.barh(place, min(length, end), color=colour, height=0.7)
    if length > end:
        for shift in (0.88, 0.90):
            stroke = [(shift - 0.005) * end, (shift + 0.005) * end]
            axes.plot(stroke, [place + 0.45, place - 0.45], color="white", linewidth=2, gid="cut")


def _over_lengths(part: Sequence[Line], lines: Sequence[Line]) -> Any:
    figure, (times, gains) = style.figure(13, 4.5, 2, _title(part, "over the visual tokens"))
    every = _names(part)
    for place, name in enumerate(dict.fromkeys(every)):
        mine = [line for line, own in zip(part, every, strict=True) if own == name]
        mine.sort(key=lambda line: int(line["visual_tokens"]))
        look = style.line(place) | {"label": name}
        times.plot([line["visual_tokens"] for line in mine], [line["ms_per_token"]["median"] for line in mine], **look)
        ratios = [(line["visual_tokens"], speedup(line, lines)) for line in mine]
        known = [(length, ratio) for length, ratio in ratios if ratio is not None]
        gains.plot([length for length, _ in known], [ratio for _, ratio in known], **look)
    for axes, text in ((times, "milliseconds a token"), (gains, "times as fast as specvlm's plain decoding")):
        axes.set(xlabel="visual tokens", ylabel=text, ylim=(0, None))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*times.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


# Before the second token


def _stages(part: Sequence[Line]) -> Any:
    """Draw the seconds before the second token, a bar a line, stacked by stage."""
    panels = _panels(part)
    what = "seconds before the second token"
    figure, every = _figure(part, what, {length: len(mine) for length, mine in panels.items()})
    longest = max(sum(line["ttft_s"].values()) for line in part)
    names = [name for name in _STAGES if any(line["ttft_s"].get(name, 0) > _VISIBLE * longest for line in part)]
    for axes, mine in zip(every, panels.values(), strict=True):
        lines, _ = _sorted(mine, [sum(line["ttft_s"].values()) for line in mine])
        style.stacked(axes, {_STAGES[name]: [line["ttft_s"].get(name, 0.0) for line in lines] for name in names})
        axes.set_yticks(range(len(lines)), _names(lines), fontsize=8)
        axes.set_xlim(0, 1.05 * longest)
    _legend(figure, every[0])
    return figure


# Single passes


def _steps(part: Sequence[Line]) -> Any:
    """Draw each kind of pass, with a mark where its floor is."""
    panels = {length: _passes(mine) for length, mine in _panels(part).items()}
    shown = {length: found for length, found in panels.items() if found}
    figure, every = _figure(part, "milliseconds of one pass", {length: len(found) for length, found in shown.items()})
    for axes, found in zip(every, shown.values(), strict=True):
        steps = list(found.values())
        axes.barh(range(len(steps)), [step["ms"] for step in steps], color=_OWN, height=0.6, label="measured")
        for place, step in enumerate(steps):
            mark = "reading weights and KV cache once" if place == 0 else None
            axes.plot([step["floor_ms"]] * 2, [place - 0.4, place + 0.4], color=_FLOOR, linewidth=2.5, label=mark)
            axes.annotate(f" {step['ms'] / step['floor_ms']:.2f}x", (step["ms"], place), va="center", fontsize=8)
        axes.set_yticks(range(len(found)), list(found), fontsize=8)
    _legend(figure, every[0])
    return figure


def _passes(part: Sequence[Line]) -> dict[str, Line]:
    """Return the passes of lines of one length, each once, by whose they are and their rows."""
    whose = {"plain": "target", "verify": "target"}
    found = [(whose.get(name, name), step) for line in part for name, step in line["steps"].items()]
    found += [(re.sub("^self", "target as its own draft,", name).rstrip(","), step)
              for name, steps in passes(part).items() for step in steps]  # fmt: skip
    first = {(name, step["rows"]): step for name, step in reversed(found)}
    order = list(dict.fromkeys(name for name, _ in sorted(found, key=lambda one: one[0] != "target")))
    keys = sorted(first, key=lambda key: (order.index(key[0]), key[1]))
    return {f"{name}, {rows} row{'s' * (rows != 1)}": first[name, rows] for name, rows in keys}
