"""What a run was, and what came of it, in words."""

from __future__ import annotations

from specvlm_bench.journal import PLAIN
from specvlm_bench.report.results import Results
from specvlm_bench.report.stats import Estimate
from specvlm_bench.report.tables import end_to_end, mat, ms_per_token, speedup


def headline(results: Results) -> str:
    """Return one sentence: what was compared, how many answers are identical, the best speedup."""
    if not results.answers:
        return "There is no answer yet."
    others = [method for method in results.methods if method != PLAIN and results.of(method)]
    on = f"on {_number(len(results.samples), 'sample')} of {_number(results.num_videos, 'video')}"
    if not others:
        return f"Plain decoding alone {on}."
    told = _identical(results) if results.compared else "no plain decoding to compare with"
    return f"{_number(len(others), 'method')} {on}: {told}{_best(results, others)}."


def _identical(results: Results) -> str:
    same = results.compared - len(results.differences)
    which = f"all {same:,}" if same == results.compared else f"{same:,} of {results.compared:,}"
    return f"{which} answers have exactly plain decoding's tokens"


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _best(results: Results, others: list[str]) -> str:
    """Return the fastest method and its speedups, or the longest MAT where nothing was timed."""
    gains = {method: gain for method in others if (gain := speedup(results, method, ms_per_token))}
    if gains:
        best = max(gains, key=lambda method: gains[method].value)
        whole = speedup(results, best, end_to_end)
        end = f", {_times(whole)} from end to end" if whole else ""
        return f"; the fastest, {best}, decodes {_times(gains[best])} as fast{end}"
    mats = {method: found for method in others if (found := mat(results, method))}
    if not mats:
        return ""
    best = max(mats, key=lambda method: mats[method].value)
    return f"; most is accepted with {best}, MAT {mats[best].value:.2f}{_range(mats[best])}"


def _times(gain: Estimate) -> str:
    return f"{gain.value:.2f} times{_range(gain)}"


def _range(estimate: Estimate) -> str:
    return "" if estimate.low is None else f" ({estimate.low:.2f} to {estimate.high:.2f})"


def progress(results: Results) -> str | None:
    """Return how much of the run is there; None of all."""
    done = len(results.answers) + len(results.failures)
    if done >= results.num_expected:
        return None
    return f"Unfinished: {done} of {results.num_expected} answers are there; the same command goes on with the rest."


def facts(results: Results) -> list[tuple[str, str]]:
    """Return what the run depends on, (name, value) each."""
    origin = results.origin
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    machine = origin["gpu"] or f"{origin['device']}, {_number(origin['cores'], 'core')}"
    quant = f", {origin['draft_quant']}" if origin["draft_quant"] not in (None, "none") else ""
    settings = ", ".join(f"{name} {value}" for name, value in origin["settings"].items())
    timed = "each answer, from the file to the last token" if origin["is_timed"] else "nothing"
    samples, videos = _number(len(results.samples), "sample"), _number(results.num_videos, "video")
    answers = f"{len(results.answers):,} of {results.num_expected:,}"
    return [
        ("command", origin["command"]),
        ("commit", origin["commit"] or "unknown"),
        ("versions", versions),
        ("machine", f"{machine}, {origin['dtype']}"),
        ("models", f"target {origin['target']}, draft {origin['draft']}{quant}"),
        ("data", f"{origin['data']}, {samples} of {videos}"),
        ("settings of all methods", settings or "the defaults"),
        ("timed", timed),
        ("answers", f"{answers}, {_number(len(results.failures), 'failure')}"),
        ("begun", origin["started"]),
    ]
