"""How plots look. matplotlib is imported only where something is drawn."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from specvlm.core.errors import ConfigError

# Okabe and Ito's colours, black and yellow replaced by ones that are legible on white and on black: any two are 16
# apart (CIE76) or more, also as the colour-blind see them.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c643c", "#b4b450")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, PALE, GREY = "#222222", "#d8d8d8", "#8a8f98"
INK_ON_LIGHT, INK_ON_DARK = "#111111", "#ffffff"  # where a picture brings its own ground
DPI = 150


def require_matplotlib(what: str, otherwise: str = "") -> None:
    """Refuse to draw where matplotlib is missing.

    Args:
        what: that needs it, with its verb, as the message says it.
        otherwise: what else than installing it helps.

    Raises:
        ConfigError: it is missing; what installs it is named.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(f'{what} matplotlib: pip install "specvlm[bench]"{otherwise}') from error


def figure(
    width: float, height: float, columns: int, title: str, rows: int = 1, heights: Sequence[float] | None = None
) -> tuple[Any, list[Any]]:
    """Return a figure, in inches, and its axes, row by row; `heights` are the shares of its rows."""
    drawn = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    drawn.suptitle(title, color=INK)
    found = list(drawn.subplots(rows, columns, squeeze=False, height_ratios=heights).flat)
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
    return drawn, found


def bars(title: str, *counts: int) -> tuple[Any, list[Any]]:
    """Return a figure and the axes of its panels, for so many horizontal bars each, the first one on top."""
    heights = [1.0 + 0.32 * count for count in counts]
    drawn, panels = figure(9, 0.6 + sum(heights), 1, title, len(counts), heights)
    for axes in panels:
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    return drawn, panels


def stacked(axes: Any, parts: Mapping[str, Sequence[float]]) -> None:
    """Stack horizontal bars: a part is a colour and holds its length in every bar."""
    left = [0.0] * len(next(iter(parts.values())))
    for place, (name, lengths) in enumerate(parts.items()):
        colour = COLOURS[place % len(COLOURS)]
        hatch = None if place < len(COLOURS) else "///"
        axes.barh(range(len(left)), lengths, left=left, color=colour, label=name, height=0.7, hatch=hatch)
        left = [sum(pair) for pair in zip(left, lengths, strict=True)]


def line(place: int) -> dict[str, Any]:
    """Return how the line of a place among others is drawn; the colours come again, dashed, after the eighth."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 4,
        "linestyle": "-" if place < len(COLOURS) else "--",
    }
