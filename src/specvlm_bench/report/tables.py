"""The tables of a report: of one run, and of two beside each other."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from specvlm_bench.journal import PLAIN, Line
from specvlm_bench.report import stats
from specvlm_bench.report.render import Cell, Column, Count, Table
from specvlm_bench.report.results import Results
from specvlm_bench.report.stats import Estimate

# Of one run


def of_run(results: Results) -> list[Table]:
    """Return the tables of a run; failures and problems only where there are any."""
    spoilt = [table for table in (failures(results), problems(results)) if table.rows]
    return [methods(results), *paired(results), *by_depth(results), differences(results), *spoilt]


def _mean(name: str, lines: Sequence[Line]) -> Estimate | None:
    return stats.mean([line[name] for line in lines], _videos(lines))


def mat(results: Results, method: str) -> Estimate | None:
    """Return the mean MAT of the samples that a method drafted for."""
    return _mean("mean_accepted_length", results.drafted(method))


def _bare_mean(name: str, lines: Sequence[Line]) -> float | None:
    return statistics.fmean(line[name] for line in lines) if lines else None


def _median(value: Callable[[Line], float | None], lines: Sequence[Line]) -> Estimate | None:
    known = [(found, line["video"]) for line in lines if (found := value(line)) is not None]
    return stats.median([found for found, _ in known], [video for _, video in known])


def _videos(lines: Sequence[Line]) -> list[str]:
    return [line["video"] for line in lines]


def ms_per_token(line: Line) -> float | None:
    """Return the milliseconds of a token after the first."""
    value: float | None = line["ms_per_token"]
    return value


def end_to_end(line: Line) -> float | None:
    """Return the seconds from the file to the last token."""
    return _seconds("total")(line)


def _seconds(name: str) -> Callable[[Line], float | None]:
    return lambda line: (line["seconds"] or {}).get(name)


def speedup(results: Results, method: str, time: Callable[[Line], float | None]) -> Estimate | None:
    """Return how many times faster than plain decoding a method is by a time: the median over samples."""
    return None if method == PLAIN else _ratio([(own, plain) for plain, own in results.beside_plain(method)], time)


def _ratio(pairs: Sequence[tuple[Line, Line]], time: Callable[[Line], float | None]) -> Estimate | None:
    """Return the median of the second one's time over the first one's."""
    times = [(time(one), time(other), one["video"]) for one, other in pairs]
    known = [(before, after, video) for before, after, video in times if before and after]
    befores, afters, videos = ([triple[place] for triple in known] for place in range(3))
    return stats.median_ratio(befores, afters, videos)


def _identical(results: Results, method: str) -> Count | None:
    both = results.beside_plain(method)
    if method == PLAIN or not both:
        return None
    return Count(sum(plain["token_ids"] == line["token_ids"] for plain, line in both), len(both))


def _peak(results: Results, method: str) -> float | None:
    known = [line["peak_memory_bytes"] for line in results.of(method) if line["peak_memory_bytes"] is not None]
    return max(known) / 2**30 if known else None


_COLUMNS: Mapping[Column, Callable[[Results, str], Cell]] = {
    Column("method"): lambda results, method: method,
    Column("samples", "d"): lambda results, method: len(results.of(method)),
    Column("identical", "d"): _identical,
    Column("MAT", ".2f"): lambda results, method: mat(results, method),
    Column("acceptance length", ".2f"): lambda run, method: _bare_mean("acceptance_length", run.drafted(method)),
    Column("target passes", ".1f"): lambda results, method: _mean("target_passes", results.of(method)),
    Column("new tokens", ".1f"): lambda results, method: _bare_mean("new_tokens", results.of(method)),
    Column("with EOS", ".1f"): lambda results, method: _bare_mean("new_tokens_with_eos", results.of(method)),
    Column("ms a token", ".2f"): lambda results, method: _median(ms_per_token, results.of(method)),
    Column("speedup a token", ".2f"): lambda results, method: speedup(results, method, ms_per_token),
    Column("TTFT, s", ".3f"): lambda results, method: _median(_seconds("time_to_first_token"), results.of(method)),
    Column("end to end, s", ".3f"): lambda results, method: _median(end_to_end, results.of(method)),
    Column("speedup end to end", ".2f"): lambda results, method: speedup(results, method, end_to_end),
    Column("peak memory, GiB", ".2f"): _peak,
}
_OTHERWISE = ("kind", "command", "started")  # what two runs may have otherwise without being told apart by it
_COUNTING = (
    "Identical: the same token ids as plain decoding's. MAT is accepted draft tokens a round, without the bonus token; "
    "acceptance length is tokens a round, with it: both over the samples in which the method drafted. They, target "
    "passes and new tokens are means over samples, as published tables have them; times and speedups are medians over "
    "samples, speedups paired by sample with plain decoding; peak memory is the largest.",
    "New tokens leave the end-of-sequence token out, with EOS counts it. ms a token is that of tokens after the first, "
    "pruning and the draft's prefill included, what comes once for a length (timed passes, captured graphs) left out; "
    "TTFT is the time to the first token. Peak memory holds the weights of both models, whatever a method uses.",
)


def _intervals(num_videos: int) -> str:
    """Return how the intervals were made, and what is wrong with them if the videos are few."""
    if num_videos < 2:
        return "All samples are of one video, which says nothing about others: there are no intervals."
    few = f" Over so few videos they hold the true value less often than that: take {stats.RELIABLE} or more."
    return (
        f"Ranges are 95 % intervals, clustered by video: {stats.RESAMPLES:,} resamples of the {num_videos} videos "
        f"(cluster bootstrap, expanded percentiles).{few * (num_videos < stats.RELIABLE)}"
    )


def methods(results: Results) -> Table:
    """Return the main table, a row a method; columns without data are left out."""
    shown = [method for method in results.methods if results.of(method)]
    cells = {column: [cell(results, method) for method in shown] for column, cell in _COLUMNS.items()}
    kept = [column for column, found in cells.items() if any(cell is not None for cell in found)]
    rows = tuple(zip(*(cells[column] for column in kept), strict=True))
    notes = (*_COUNTING, _intervals(results.num_videos)) if rows else ("There is no answer yet.",)
    return Table("methods", "Methods", tuple(kept), rows, notes)


def paired(results: Results) -> list[Table]:
    """Return how much more each method had accepted than the first one that drafted and kept as much."""
    rows, firsts = [], dict[str, str]()
    for method in results.drafting:
        first = firsts.setdefault(_kept(results, method), method)
        if method != first:
            before, after = _unzipped(_pairs(results, first, method))
            mats = ([line["mean_accepted_length"] for line in lines] for lines in (before, after))
            found = stats.mean_difference(next(mats), next(mats), _videos(before))
            rows.append((method, first, len(before), found))
    columns = (Column("method"), Column("beside"), Column("samples", "d"), Column("MAT, difference", "+.2f"))
    note = "Paired by sample: an interval that leaves out 0 ranks the two, also where those of the table above overlap."
    title = "MAT beside the first method with the same tree that keeps as much"
    return [Table("paired", title, columns, tuple(rows), (note,))] if rows else []


def _kept(results: Results, method: str) -> str:
    """Return what is equal for methods that differ in which tokens the draft sees alone."""
    settings = results.settings(method)
    is_whole = settings["pruner"] == "none"
    drafts = [settings.get(name) for name in ("drafter", "tree", "policy")]
    return json.dumps([*drafts, *((1.0, None) if is_whole else (settings["keep_ratio"], settings["keep_tokens"]))])


def _pairs(results: Results, first: str, second: str) -> list[tuple[Line, Line]]:
    """Return both methods' answers to the samples that both drafted for."""
    mine = {line["sample"]: line for line in results.drafted(second)}
    return [(line, mine[line["sample"]]) for line in results.drafted(first) if line["sample"] in mine]


def depths(lines: Sequence[Line]) -> int:
    """Return the largest depth at which a node was accepted."""
    return max((len(line["accepted_per_depth"]) for line in lines), default=0)


def accepted_at(line: Line, depth: int) -> int:
    """Return the rounds that accepted a node of a depth, from 1; at depth 0 all rounds."""
    if depth == 0:
        return int(line["rounds"])
    counts = line["accepted_per_depth"]
    return int(counts[depth - 1]) if depth <= len(counts) else 0


def share_at(lines: Sequence[Line], depth: int, given: int = 0) -> Estimate | None:
    """Return the share of rounds that accepted a node of a depth, of those that did at the depth `given`."""
    parts, wholes = ([accepted_at(line, at) for line in lines] for at in (depth, given))
    return stats.pooled(parts, wholes, _videos(lines))


def by_depth(results: Results) -> list[Table]:
    """Return acceptance by depth: of all rounds, and of those that accepted a node of the depth before."""
    lines = {method: results.of(method) for method in results.drafting}
    deepest = range(1, max(map(depths, lines.values()), default=0) + 1)
    columns = (Column("method"), *(Column(f"depth {depth}", ".1%") for depth in deepest))
    if not deepest:
        return []

    def cell(mine: Sequence[Line], depth: int, step: int) -> Estimate | None:
        """Return the share given the depth `step` before, of all rounds where that is none."""
        return share_at(mine, depth, depth - step if step else 0) if depth <= depths(mine) else None

    of_all, of_before = (
        tuple((method, *(cell(mine, depth, step) for depth in deepest)) for method, mine in lines.items())
        for step in (0, 1)
    )
    note = "Over all rounds of all samples; one that drafted less deep did not accept. Empty: none accepted so deep."
    return [
        Table("depths", "Share of rounds that accepted a node of a depth", columns, of_all, (note,)),
        Table("depths-given", "The same, of the rounds that accepted one of the depth before", columns, of_before),
    ]


def differences(results: Results) -> Table:
    """Return where answers part from plain decoding's, and how near the two candidates were."""
    columns = (Column("sample"), Column("method"), Column("position", "d"), Column("plain decoding's token"),
               Column("the method's token"), Column("logit gap", ".4f"))  # fmt: skip
    rows = tuple(
        (one.sample, one.method, one.index, _token(one.plain_token, one.plain_text),
         _token(one.other_token, one.other_text), one.gap)
        for one in results.differences
    )  # fmt: skip
    note = (
        "The first token that differs, counted from 0; the gap is the logit of plain decoding's token minus the "
        "other's, as plain decoding saw them: empty where one of the two texts had ended."
    )
    same = f"All {results.compared:,} answers have exactly plain decoding's tokens."
    none = same if results.compared else "There is nothing of plain decoding to compare with."
    return Table("differences", "Where answers part from plain decoding", columns, rows, (note if rows else none,))


def _token(token: int | None, text: str | None) -> str:
    if token is None:
        return "end of text"
    return f"{token}" if text is None else f"{json.dumps(text, ensure_ascii=False)} ({token})"


def failures(results: Results) -> Table:
    """Return what gave no answer."""
    columns = (Column("sample"), Column("method"), Column("what failed"))
    rows = tuple((line["sample"], line["method"], line["text"]) for line in results.failures)
    return Table("failures", "No answer", columns, rows)


def problems(results: Results) -> Table:
    """Return the samples that the data do not give."""
    return Table("problems", "Samples left out", (Column("where"), Column("why")), tuple(results.problems))


# Of two runs


def of_two(first: Results, second: Results) -> list[Table]:
    """Return how the second run compares with the first, and in what else they differ."""
    both = [method for method in first.methods if method in second.methods]
    pairs = {method: _shared(first, second, method) for method in both}
    rows = tuple((method, *_compared(pairs[method])) for method in both if pairs[method])
    columns = (Column("method"), Column("samples", "d"), Column("same tokens", "d"),
               Column(f"MAT, {first.name}", ".2f"), Column(f"MAT, {second.name}", ".2f"),
               Column("MAT, difference", "+.2f"), Column("ms a token, ratio", ".3f"),
               Column("end to end, ratio", ".3f"))  # fmt: skip
    differing = (Column("setting"), Column(first.name), Column(second.name))
    others = tuple(_differing(first, second))
    notes = _two_notes(first, second, [pair for shared in pairs.values() for pair in shared])
    title = f"{second.name} beside {first.name}"
    return [
        Table(f"{second.prefix}compared", title, columns, rows, tuple(notes)),
        Table(f"{second.prefix}settings", "What else the two runs do not share", differing, others,
              () if others else ("Nothing: commit, versions, machine and settings are the same.",)),
    ]  # fmt: skip


def _shared(first: Results, second: Results, method: str) -> list[tuple[Line, Line]]:
    """Return the two runs' answers to the samples that both have: of the same name, video and prompt."""
    pairs = [(first.answers.get((line["sample"], method)), line) for line in second.of(method)]
    return [
        (one, other)
        for one, other in pairs
        if one is not None and all(one[name] == other[name] for name in ("video", "prompt"))
    ]


def _compared(pairs: Sequence[tuple[Line, Line]]) -> tuple[Cell, ...]:
    drafted = [(one, other) for one, other in pairs if one["rounds"] and other["rounds"]]
    befores, afters = ([line["mean_accepted_length"] for line in lines] for lines in _unzipped(drafted))
    videos = _videos(_unzipped(drafted)[0])
    ratios = [_ratio(pairs, time) for time in (ms_per_token, end_to_end)]
    same = Count(sum(one["token_ids"] == other["token_ids"] for one, other in pairs), len(pairs))
    mats = stats.mean(befores, videos), stats.mean(afters, videos), stats.mean_difference(befores, afters, videos)
    return len(pairs), same, *mats, *ratios


def _unzipped(pairs: Sequence[tuple[Line, Line]]) -> tuple[list[Line], list[Line]]:
    return [one for one, _ in pairs], [other for _, other in pairs]


def _two_notes(first: Results, second: Results, pairs: Iterable[tuple[Line, Line]]) -> Iterator[str]:
    videos = {line["sample"]: line["video"] for line, _ in pairs}
    yield (
        f"{len(videos)} samples are in both runs, of {len(first.samples)} in {first.name} and {len(second.samples)} in "
        f"{second.name}: they have the same name, video and prompt."
    )
    if videos:
        yield (
            f"Figures are over these alone, paired by sample: the mean difference of MAT ({second.name} minus "
            f"{first.name}) and the median ratio of times ({second.name} over {first.name}; below 1 is faster). "
            f"{_intervals(len(set(videos.values())))}"
        )
    for one, other in ((first, second), (second, first)):
        if alone := [method for method in one.methods if method not in other.methods]:
            yield f"Only in {one.name}: {', '.join(alone)}."


def _differing(first: Results, second: Results) -> Iterator[tuple[str, str, str]]:
    """Yield what the two runs were told or found otherwise: its name, and both values."""
    both = set(first.methods) & set(second.methods)
    one, other = (dict(_flat({**run.origin, "methods": {name: run.origin["methods"][name] for name in sorted(both)}}))
                  for run in (first, second))  # fmt: skip
    for name in dict.fromkeys((*one, *other)):
        if name not in _OTHERWISE and one.get(name) != other.get(name):
            yield name, json.dumps(one.get(name)), json.dumps(other.get(name))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values that hold no others, by their path."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
