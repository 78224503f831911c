"""The table of a speed run, and its lines read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specvlm.core.errors import ConfigError

Line = dict[str, Any]
_NEEDED = ("pair", "method", "visual_tokens", "keep_ratio", "tree", "ms_per_token", "steps", "ttft_s", "provenance")
_USUAL_DRAFTS = (None, "published", "self")


def read(names: Sequence[str]) -> list[Line]:
    """Return the lines of files of results.

    Raises:
        ConfigError: one cannot be read or a line is no result; the line is named.
    """
    return [line for name in names for line in _read(name)]


def _read(name: str) -> list[Line]:
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read ({error}): give a file of bench speed --out") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = json.loads(line)
            lines.append({key: found[key] for key in _NEEDED} | found)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{name}, line {number} is no result of bench speed: {line[:60]}") from error
    return lines


def measured(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that hold a measurement."""
    return [line for line in lines if line["ms_per_token"] is not None]


def label(line: Line) -> str:
    """Return a method with its settings."""
    parts = [line["tree"] or line["method"]]
    if line["keep_ratio"] is not None:
        parts.append(f"keep {line['keep_ratio']:g}")
    if line.get("draft_quant") not in (None, "none"):
        parts.append(line["draft_quant"])
    if line.get("planted_draft") not in _USUAL_DRAFTS:
        parts.append(line["planted_draft"])
    return " ".join(parts)


_WORDS = {
    "plain": "plain decoding",
    "auto": "chosen trees",
    "self": "the target drafts for itself",
    "lookup": "prompt lookup",
    "vllm-plain": "vLLM, language model alone",
    "transformers-eager": "transformers generate()",
    "transformers-static": "transformers, compiled, static cache",
    "transformers-assisted": "transformers, assisted by the draft",
}
_TREES = {"paper": "the paper's tree"}


def words(line: Line, *, keep_ratio: bool) -> str:
    """Return what a line measured in words for who does not know the names of methods.

    Args:
        line: a measurement.
        keep_ratio: say how much of the video the draft saw.
    """
    tree: str | None = line["tree"]
    name = str(_WORDS.get(line["method"], line["method"]))
    if tree is not None:
        name = f"a chain of {tree.removeprefix('chain:')}" if tree.startswith("chain:") else _TREES.get(tree, tree)
    parts = [name if is_peer(line) else f"specvlm: {name}"]
    if line.get("draft_quant") not in (None, "none"):
        parts.append(f"{line['draft_quant']} draft" if line.get("drafter") != "self" else line["draft_quant"])
    if keep_ratio and line["keep_ratio"] is not None:
        parts.append(f"{100 * line['keep_ratio']:.4g}% of the video")
    return ", ".join(parts)


def is_peer(line: Line) -> bool:
    """Return whether another engine was measured."""
    return str(line["method"]).startswith(("vllm", "transformers"))


def compared(lines: Sequence[Line]) -> list[Line]:
    """Return the measurements that a plot sets beside each other: each method, length and setting once, the first.

    Planted drafts that are no good at times are left out: what they cost is a question of its own, and in the table.
    """
    usual = [line for line in measured(lines) if line.get("planted_draft") in _USUAL_DRAFTS]
    first = {(*_place(line), words(line, keep_ratio=True)): line for line in reversed(usual)}
    return [line for line in usual if any(line is one for one in first.values())]


def speedup(line: Line, lines: Sequence[Line]) -> float | None:
    """Return how many times faster a token is than by plain decoding of the same pair and length, None without it.

    Where several runs are looked at, it is plain decoding of the same run that counts.
    """
    same = [other for other in measured(lines) if other["method"] == "plain" and _place(other) == _place(line)]
    own = [other for other in same if other["provenance"] == line["provenance"]]
    for other in (own or same)[:1]:
        return float(other["ms_per_token"]["median"] / line["ms_per_token"]["median"])
    return None


def _place(line: Line) -> tuple[str, int]:
    return line["pair"], line["visual_tokens"]


def _steps(line: Line) -> str:
    texts = []
    for name, step in line["steps"].items():
        texts.append(f"{name} {step['ms']:.2f} ({step['ms'] / step['floor_ms']:.2f}x, {step['rows']} rows)")
    return ", ".join(texts)


def _text(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _spread(spread: Mapping[str, float] | None, form: str) -> str:
    if spread is None:
        return ""
    median, p10, p90 = (format(spread[name], form) for name in ("median", "p10", "p90"))
    return f"{median} ({p10} to {p90})"


def _chosen(line: Line) -> str:
    """Return the share of plain passes and the shapes chosen most."""
    if line.get("plain_share") is None:
        return ""
    shapes = [f"{shape['nodes']}/{shape['depth']} {shape['share']:.0%}" for shape in line["shapes"]]
    return ", ".join([f"plain {line['plain_share']:.0%}", *shapes])


def _over_plain(line: Line) -> str:
    return _text(line.get("over_plain"), ".3f") if line.get("planted_draft") == "hopeless" else ""


def _followed(line: Line) -> str:
    """Return after how many verified rounds the policy followed each change; - where it did not."""
    texts = []
    for name, to_good in (("hopeless", False), ("good", True)):
        rounds = [change["rounds"] for change in line.get("changes", ()) if change["to_good"] is to_good]
        if rounds:
            texts.append(f"{name} {' '.join('-' if one is None else str(one) for one in rounds)}")
    return ", ".join(texts)


_COLUMNS: dict[str, Callable[[Line], str]] = {
    "method": label,
    "ms a token (p10 to p90)": lambda line: _spread(line["ms_per_token"], ".2f"),
    "MAT": lambda line: _text(line.get("mean_accepted_length"), ".2f"),
    "steps, ms (x floor)": _steps,
    "before the second token, s": lambda line: ", ".join(f"{k} {v:.2f}" for k, v in line["ttft_s"].items()),
    "256 tokens, s": lambda line: _text(line.get("end_to_end_s"), ".2f"),
    "peak, GiB": lambda line: _text(line.get("peak_gib"), ".1f"),
    "as planted": lambda line: {True: "yes", False: "NO", None: ""}[line.get("follows_plant")],
    "passes chosen, nodes/depth": _chosen,
    "time over plain": _over_plain,
    "rounds until it followed a turn to": _followed,
}
_ANSWER_COLUMNS: dict[str, Callable[[Line], str]] = {
    "new tokens": lambda line: str(line["num_tokens"]),
    "method": label,
    "answer, s (p10 to p90)": lambda line: _spread(line["answer_s"], ".3f"),
    "share of plain (p10 to p90)": lambda line: _spread(line["answer_over_plain"], ".3f"),
    "first answer, s": lambda line: _text(line["first_answer_s"], ".3f"),
    "MAT": _COLUMNS["MAT"],
    "as planted": _COLUMNS["as planted"],
    "as plain": lambda line: {True: "yes", False: "NO", None: ""}[line["is_plain"]],
}
_OPTIONAL = ("passes chosen, nodes/depth", "time over plain", "rounds until it followed a turn to")


def table(lines: Sequence[Line]) -> str:
    """Return a Markdown page: a table a pair and number of visual tokens, then the failures."""
    if not lines:
        return "nothing was measured\n"
    pages = [f"{text}\n" for text in dict.fromkeys(_origin(line["provenance"]) for line in lines)]
    for pair, visual_tokens in dict.fromkeys(map(_place, measured(lines))):
        part = [line for line in measured(lines) if _place(line) == (pair, visual_tokens)]
        pages += [f"## {pair}, {visual_tokens} visual tokens\n", *_told(part), _part(part), *_passes(part)]
    answers = [line for line in lines if line.get("answer_s")]
    for pair, visual_tokens in dict.fromkeys(map(_place, answers)):
        part = [line for line in answers if _place(line) == (pair, visual_tokens)]
        pages += [f"## {pair}, {visual_tokens} visual tokens: whole answers\n", *_told(part), _rows(_answers(part))]
    failures = [line for line in lines if line["ms_per_token"] is None and not line.get("answer_s")]
    pages += [f"{line['pair']}, {line['visual_tokens']}, {label(line)}: {line.get('error')}\n" for line in failures]
    return "\n".join(pages)


def _told(part: Sequence[Line]) -> list[str]:
    return [f"The models were shown: {part[0]['shown']}.\n"] if part[0].get("shown") else []


def _origin(provenance: Line) -> str:
    where = provenance.get("gpu") or "CPU"
    return f"{where}, {provenance['read_gb_s']:.0f} GB/s read. Made by `{provenance['command']}`."


def _part(part: Sequence[Line]) -> str:
    columns = {name: [text(line) for line in part] for name, text in _COLUMNS.items()}
    kept = [(name, texts) for name, texts in columns.items() if name not in _OPTIONAL or any(texts)]
    kept.insert(2, ("speedup", [_text(speedup(line, part), ".2f") for line in part]))
    return _rows(dict(kept))


def _answers(part: Sequence[Line]) -> dict[str, list[str]]:
    """Return the columns of whole answers."""
    return {name: [text(line) for line in part] for name, text in _ANSWER_COLUMNS.items()}


def _rows(columns: Mapping[str, Sequence[str]]) -> str:
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    rows += [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join(rows) + "\n"


def passes(part: Sequence[Line]) -> dict[str, list[dict[str, Any]]]:
    """Return the single passes of lines of one pair and length, by what runs them, each once."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in part:
        for name, steps in (line.get("passes") or {}).items():
            quant = "" if line["draft_quant"] == "none" else f" {line['draft_quant']}"
            whose = "self" if line["drafter"] == "self" else "draft"
            found.setdefault("target" if name == "verify" else whose + quant, steps)
    return found


def _passes(part: Sequence[Line]) -> list[str]:
    """Return a table of single passes by rows, if any were timed."""
    found = passes(part)
    if not found:
        return []
    counts = sorted({step["rows"] for steps in found.values() for step in steps})
    rows = [f"| pass, ms (x floor), by rows | {' | '.join(map(str, counts))} |", "|---|" + "---|" * len(counts)]
    for name, steps in found.items():
        cells = {step["rows"]: f"{step['ms']:.2f} ({step['ms'] / step['floor_ms']:.2f}x)" for step in steps}
        rows.append(f"| {name} | {' | '.join(cells.get(count, '') for count in counts)} |")
    return ["\n".join(rows) + "\n"]
