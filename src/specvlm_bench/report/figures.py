"""The pictures of a report: up to eight methods are lines, more are rows of a table of colours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from specvlm_bench import style
from specvlm_bench.journal import PLAIN, Line
from specvlm_bench.report import stats
from specvlm_bench.report.results import Results
from specvlm_bench.report.stats import Estimate
from specvlm_bench.report.tables import depths, end_to_end, mat, ms_per_token, share_at

BIN = 16  # tokens of the text, over which acceptance is averaged
_LINES = 8  # methods that can be told apart as lines
_DOTS = 400  # points that can be told apart
_WRITTEN = 16  # columns of a table of colours whose values are written in them
_STAGES = "other is what no stage accounts for. Medians of stages need not add up to the median of the whole."
_LENGTHS = 6  # bins of visual tokens
_VISIBLE = 0.001  # of the longest bar, below which a stage is not seen
_REACHED = 0.25  # of the answers that must reach a place in the text
_MAT = "drafted tokens accepted a round (MAT)"
_BANDS = "Bands are 95 % intervals clustered by video."

Points = Sequence[tuple[float, Estimate]]


@dataclass(frozen=True)
class Drawing:
    """A picture, or why there is none.

    Args:
        slug: its name in a file's.
        title: what it shows.
        note: how it is read; or what it would need.
        figure: matplotlib's; None where the results do not carry it.
    """

    slug: str
    title: str
    note: str
    figure: Any


def of_run(results: Results) -> list[Drawing]:
    """Return all pictures of a run."""
    return [plot(results) for plot in (keep_ratios, lengths, by_depth, over_text, stages, by_sample)]


# MAT over keep_ratio


def keep_ratios(results: Results) -> Drawing:
    """Draw MAT over the share kept, a line a pruner, a panel for methods that differ in nothing else."""
    slug, title = "mat-over-keep-ratio", "MAT over keep ratio"
    panels = _panels(results)
    if not panels:
        return Drawing(slug, title, "No two methods differ in nothing but pruner and keep ratio.", None)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn, axes = style.figure(max(9, 2.5 + 4.2 * columns), 0.6 + 3.6 * rows, columns, title, rows)
    pruners = list(dict.fromkeys(pruner for panel in panels.values() for pruner, _ in panel))
    for one, (name, panel) in zip(axes, panels.items(), strict=False):
        mats = {key: found for key, method in panel.items() if (found := mat(results, method))}
        _keep_ratios(one, pruners, mats)
        one.set_title(name, fontsize=9)
    for spare in axes[len(panels) :]:
        spare.set_visible(False)
    handles = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    note = f"{_BANDS} The dashed line is the draft that sees every visual token."
    return Drawing(slug, title, note, drawn)


Panel = Mapping[tuple[str, float], str]  # {(pruner, keep_ratio): method}


def _panels(results: Results) -> dict[str, Panel]:
    """Return the methods that differ in nothing but pruner and keep_ratio, if they have several ratios, by the rest."""
    found: dict[tuple[tuple[str, str], ...], dict[tuple[str, float], str]] = {}
    for method in results.drafting:
        settings = results.settings(method)
        pruner, ratio = settings.pop("pruner"), settings.pop("keep_ratio")
        key = ("none", 1.0) if pruner == "none" or ratio == 1 else (pruner, ratio)
        found.setdefault(tuple((name, str(value)) for name, value in sorted(settings.items())), {})[key] = method
    several = {rest: panel for rest, panel in found.items() if len({key for key in panel if key[0] != "none"}) > 1}
    common = set.intersection(*map(set, several)) if several else set()
    return {
        ", ".join(f"{name} {value}" for name, value in rest if (name, value) not in common): panel
        for rest, panel in several.items()
    }


def _keep_ratios(axes: Any, pruners: Sequence[str], mats: Mapping[tuple[str, float], Estimate]) -> None:
    ratios = sorted({ratio for pruner, ratio in mats if pruner != "none"})
    shown = [pruner for pruner in pruners if pruner != "none"]
    for place, pruner in enumerate(shown):
        mine = [(at, mats[pruner, ratio]) for at, ratio in enumerate(ratios) if (pruner, ratio) in mats]
        if mine:
            _line(axes, mine, style.line(place) | {"label": pruner}, _opacity(len(shown)))
    if ("none", 1.0) in mats:
        axes.axhline(mats["none", 1.0].value, color=style.INK, linestyle="--", linewidth=1, label="unpruned")
    axes.set_xticks(
        range(len(ratios)), [f"{ratio:.0%}" if (100 * ratio).is_integer() else f"{ratio:.1%}" for ratio in ratios]
    )
    axes.set(xlabel="share of the visual tokens kept", ylabel=_MAT)


# Speedup over visual tokens


def lengths(results: Results) -> Drawing:
    """Draw the speedup a token over the visual tokens: a point a sample, and medians."""
    slug, title = "speedup-over-visual-tokens", "Speedup a token over visual tokens"
    others = [method for method in results.methods if method != PLAIN and method not in results.drafting]
    shown = (*results.drafting, *others)  # in this order a method has the colour that it has in the other pictures
    found = {method: points for method in shown if (points := _gains(results, method))}
    if not found:
        return Drawing(slug, title, "No sample was timed both by plain decoding and by another method.", None)
    counts = sorted(length for points in found.values() for length, _, _ in points)
    if counts[0] == counts[-1]:
        return Drawing(slug, title, f"All samples have {counts[0]:,} visual tokens.", None)
    bins = _bins(counts)
    medians = {method: _binned(points, bins) for method, points in found.items()}
    note = "Medians over samples, in bins of a length each or of about as many samples each."
    if len(found) > _LINES:
        return Drawing(slug, title, note, _heat(title, "visual tokens, median of a bin", medians, ".2f", "{:,.0f}"))
    drawn, axes = _lines(title, "visual tokens", "times faster than plain decoding", medians)
    axes.axhline(1, color=style.INK, linestyle="--", linewidth=1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if sum(map(len, found.values())) > _DOTS:
        return Drawing(slug, title, f"{note} {_BANDS}", drawn)
    for place, points in enumerate(found.values()):
        axes.scatter([length for length, _, _ in points], [gain for _, gain, _ in points],
                     s=9, alpha=0.5, linewidths=0, color=style.COLOURS[place])  # fmt: skip
    return Drawing(slug, title, f"{note} A dot is a sample. {_BANDS}", drawn)


def _gains(results: Results, method: str) -> list[tuple[int, float, str]]:
    """Return (visual tokens, speedup a token, video) of each sample."""
    both = results.beside_plain(method)
    times = [(plain["visual_tokens"], ms_per_token(plain), ms_per_token(own), own["video"]) for plain, own in both]
    return [(length, before / after, video) for length, before, after, video in times if before and after]


def _bins(counts: Sequence[int]) -> list[tuple[float, float, float]]:
    """Return (lowest, next bin's lowest, median) visual tokens of bins: a bin a number if few, else even shares."""
    several = sorted(set(counts))
    if len(several) > _LENGTHS:
        several = sorted(set(np.quantile(counts, np.arange(_LENGTHS) / _LENGTHS, method="lower").tolist()))
    ends = [*several[1:], math.inf]
    return [(low, high, statistics.median(count for count in counts if low <= count < high))
            for low, high in zip(several, ends, strict=True)]  # fmt: skip


def _binned(points: Sequence[tuple[int, float, str]], bins: Sequence[tuple[float, float, float]]) -> Points:
    """Return (the bin's median length, the median speedup) of each bin that holds a sample."""
    found = []
    for low, high, middle in bins:
        inside = [(gain, video) for length, gain, video in points if low <= length < high]
        if estimate := stats.median([gain for gain, _ in inside], [video for _, video in inside]):
            found.append((middle, estimate))
    return found


# Acceptance


def by_depth(results: Results) -> Drawing:
    """Draw the share of rounds that accepted a node of each depth."""
    slug, title = "acceptance-by-depth", "Acceptance by depth"
    lines = {method: results.of(method) for method in results.drafting}
    series = {method: _known((depth, share_at(mine, depth)) for depth in range(1, depths(mine) + 1))
              for method, mine in lines.items()}  # fmt: skip
    if not any(series.values()):
        return Drawing(slug, title, "No drafted token was accepted.", None)
    x, y = "depth of the drafted token", "share of rounds that accepted one"
    note = "Over all rounds of all samples."
    if len(series) > _LINES:
        return Drawing(slug, title, note, _heat(f"{title}: {y}", x, series, ".0%", "{:.0f}"))
    drawn, axes = _lines(title, x, y, series)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, place: f"{share:.0%}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return Drawing(slug, title, f"{note} {_BANDS}", drawn)


def over_text(results: Results) -> Drawing:
    """Draw the accepted tokens a round over the place in the text."""
    slug, title = "acceptance-over-text", "Acceptance over the text"
    series = {method: _over_text(results.drafted(method)) for method in results.drafting}
    if max(map(len, series.values()), default=0) < 2:
        return Drawing(slug, title, f"No text is longer than {BIN} tokens and has more than one round.", None)
    x, y = f"place in the text, in bins of {BIN} tokens", "accepted tokens a round"
    note = (
        f"Up to where {_REACHED:.0%} of the texts reach; further back there are only the longer ones. The last round "
        "of a text, which its end cuts, is left out."
    )
    if len(series) > _LINES:
        return Drawing(slug, title, note, _heat(f"{title}: {y}", x, series, ".1f", "{:.0f}"))
    drawn, axes = _lines(title, x, y, series)
    axes.set_ylim(0, None)
    return Drawing(slug, title, f"{note} {_BANDS}", drawn)


def _over_text(lines: Sequence[Line]) -> Points:
    """Return (middle of a bin, accepted tokens a round that began there)."""
    bins: dict[int, list[tuple[int, int, str]]] = {}
    for line in lines:
        for number, (rounds, accepted) in _rounds_by_bin(line).items():
            bins.setdefault(number, []).append((rounds, accepted, line["video"]))
    reached = {number: found for number, found in sorted(bins.items()) if len(found) >= _REACHED * len(lines)}
    return _known((BIN * (number + 0.5), _accepted_per_round(found)) for number, found in reached.items())


def _accepted_per_round(found: Sequence[tuple[int, int, str]]) -> Estimate | None:
    """Return accepted tokens over rounds, given (rounds, accepted tokens, video) of each answer."""
    return stats.pooled([one[1] for one in found], [one[0] for one in found], [one[2] for one in found])


def _rounds_by_bin(line: Line) -> dict[int, tuple[int, int]]:
    """Return (rounds, tokens that they accepted) by the bin that they began in, the last pass left out."""
    found: dict[int, tuple[int, int]] = {}
    tokens = line["tokens_per_pass"]
    begins = accumulate(tokens, initial=0)
    for begin, drafted, count in list(zip(begins, line["drafted_per_pass"], tokens, strict=False))[:-1]:
        if drafted:
            rounds, accepted = found.get(begin // BIN, (0, 0))
            found[begin // BIN] = rounds + 1, accepted + count - 1
    return found


def _known(points: Iterable[tuple[float, Estimate | None]]) -> Points:
    return [(x, estimate) for x, estimate in points if estimate is not None]


# Stages and samples


def stages(results: Results) -> Drawing:
    """Draw the median seconds of each stage, stacked: one disturbed answer moves no bar."""
    slug, title = "stages", "Median seconds of each stage of an answer"
    all_methods = {method: [line["seconds"] for line in results.of(method) if end_to_end(line) is not None]
                   for method in results.methods}  # fmt: skip
    timed = {method: seconds for method, seconds in all_methods.items() if seconds}
    if not timed:
        return Drawing(slug, title, "Nothing was timed.", None)
    split = {method: [_stages(one) for one in seconds] for method, seconds in timed.items()}
    names = list(dict.fromkeys(name for seconds in split.values() for one in seconds for name in one))
    medians = {name: [statistics.median(one.get(name, 0.0) for one in seconds) for seconds in split.values()]
               for name in names}  # fmt: skip
    longest = max(statistics.median(one["total"] for one in seconds) for seconds in timed.values())
    drawn, [axes] = style.bars(title, len(split))
    style.stacked(axes, {name: lengths for name, lengths in medians.items() if max(lengths) > _VISIBLE * longest})
    axes.set_yticks(range(len(split)), list(split), fontsize=8)
    axes.set_xlabel("seconds")
    drawn.legend(loc="outside right upper", fontsize=8, frameon=False)
    return Drawing(slug, title, f"From the file to the last token; {_STAGES}", drawn)


def _stages(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each stage, and of none."""
    whole = ("time_to_first_token", "total")
    found = {name.replace("_", " "): value for name, value in seconds.items() if name not in whole}
    return found | {"other": max(0.0, seconds["total"] - math.fsum(found.values()))}


def by_sample(results: Results) -> Drawing:
    """Draw the MAT of each sample, the samples in the order of their mean over methods."""
    slug, title = "mat-by-sample", "MAT by sample"
    found: dict[str, dict[str, float]] = {}
    for method in results.drafting:
        for line in results.drafted(method):
            found.setdefault(line["sample"], {})[method] = line["mean_accepted_length"]
    if len(found) < 2:
        return Drawing(slug, title, "Fewer than two samples were drafted for.", None)
    mats = sorted(found.values(), key=lambda mine: statistics.fmean(mine.values()))
    series = {method: [(place, Estimate(mine[method])) for place, mine in enumerate(mats, 1) if method in mine]
              for method in results.drafting}  # fmt: skip
    x, note = "samples, by their mean over methods", "Each sample is in the same place for all methods."
    if len(series) > _LINES:
        return Drawing(slug, title, note, _heat(title, x, series, ".1f", "{:.0f}"))
    drawn, axes = _lines(title, x, _MAT, series, linestyle="")
    ends = [(min(mine.values()), max(mine.values())) for mine in mats]
    axes.vlines(range(1, len(mats) + 1), *zip(*ends, strict=True), color=style.PALE, linewidth=2, zorder=1)
    axes.set_ylim(0, None)
    return Drawing(slug, title, note, drawn)


# Lines and tables of colours


def _lines(title: str, x: str, y: str, series: Mapping[str, Points], **changes: Any) -> tuple[Any, Any]:
    """Return a figure and its axes, with a line a method, its look changed, and a band where there are intervals."""
    drawn, [axes] = style.figure(9, 4.2, 1, title)
    for place, (method, points) in enumerate(series.items()):
        _line(axes, points, style.line(place) | changes | {"label": method}, _opacity(len(series)))
    axes.set(xlabel=x, ylabel=y)
    drawn.legend(loc="outside right upper", fontsize=8, frameon=False)
    return drawn, axes


def _opacity(count: int) -> float:
    """Return how opaque the bands of so many lines are."""
    return 0.4 / (count + 1)


def _line(axes: Any, points: Points, look: Mapping[str, Any], opacity: float) -> None:
    """Draw a line, with a band where there are intervals."""
    axes.plot([at for at, _ in points], [one.value for _, one in points], **look)
    bands = [(at, one.low, one.high) for at, one in points if one.low is not None]
    if len(bands) == 1:
        axes.vlines(*bands[0], color=look["color"], linewidth=1)
    elif bands:
        axes.fill_between(*zip(*bands, strict=True), color=look["color"], alpha=opacity, linewidth=0)


def _heat(title: str, x: str, series: Mapping[str, Points], form: str, x_form: str) -> Any:
    """Return a figure with a row a method and a column a place; few columns have their values written in them."""
    places = sorted({at for points in series.values() for at, _ in points})
    values = np.full((len(series), len(places)), np.nan)
    for row, points in enumerate(series.values()):
        for at, one in points:
            values[row, places.index(at)] = one.value
    drawn, [axes] = style.bars(title, len(series))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    mesh = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    if len(places) <= _WRITTEN:
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for row, column in np.argwhere(~np.isnan(values)).tolist():
            colour = style.INK_ON_LIGHT if values[row, column] > middle else style.INK_ON_DARK
            axes.text(
                column, row, format(values[row, column], form), color=colour, fontsize=7, ha="center", va="center"
            )
    shown = range(0, len(places), math.ceil(len(places) / _WRITTEN))
    axes.set_xticks(list(shown), [x_form.format(places[column]) for column in shown], fontsize=8)
    axes.set_yticks(range(len(series)), list(series), fontsize=8)
    axes.set_xlabel(x)
    drawn.colorbar(mesh, ax=axes, format=lambda value, place: format(value, form))
    return drawn
