"""How much of the draft does the target accept, by pruner and keep_ratio, and is every answer word for word the same?

Every clip is read, encoded and prefilled once on the target; each method then decodes from there, drafting its tree in
every round, so methods differ in nothing but what the draft sees. Every answer is compared with plain decoding in this
engine and with transformers' own generate() on the same inputs. The ceiling of MAT is the tree's depth (5 for the
paper's).

    specvlm bench acceptance                                    # the bundled pair on its 40 held-out clips
    specvlm bench acceptance --target T --draft D --clips DIR   # DIR/clips.jsonl: a line {"id", "file", "prompt"} each

Error bars are 95 % intervals over clips (Student's t); differences between pruners are paired by clip.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specvlm.bench.provenance import command_line, provenance, writable
from specvlm.config import EngineConfig
from specvlm.engine import Prefilled, Request, SpecVLM
from specvlm.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """One column of the sweep."""

    pruner: str
    keep_ratio: float
    tree: str


@dataclass(frozen=True)
class Result:
    """One clip under one method."""

    clip: str
    pruner: str
    keep_ratio: float
    tree: str
    visual_tokens: int
    kept_visual_tokens: int
    completion_tokens: int
    target_passes: int
    rounds: int
    accepted_tokens: int
    is_plain: bool  # the ids are those of plain decoding in this engine
    is_generate: bool  # and those of transformers' generate()

    @property
    def is_identical(self) -> bool:
        """Whether the ids are those of both."""
        return self.is_plain and self.is_generate

    @property
    def mat(self) -> float:
        """Accepted draft tokens a round, without the bonus token."""
        return self.accepted_tokens / max(1, self.rounds)


def methods(pruners: Sequence[str], keep_ratios: Sequence[float], trees: Sequence[str]) -> list[Method]:
    """Return the sweep: unpruned once a tree, then every pruner at every ratio below 1, further trees at 0.1 alone."""
    sweep = []
    for place, tree in enumerate(trees):
        sweep.append(Method("none", 1.0, tree))
        below = [ratio for ratio in keep_ratios if ratio < 1] if place == 0 else [0.1]
        sweep += [Method(name, ratio, tree) for name in pruners if name != "none" for ratio in below]
    return sweep


def read_clips(directory: Path) -> list[dict[str, str]]:
    """Return the clips of a directory's clips.jsonl.

    Raises:
        ConfigError: it is missing or malformed; the line is named.
    """
    file = directory / "clips.jsonl"
    if not file.is_file():
        raise ConfigError(f"there is no {file}: write a line {{id, file, prompt}} for each video")
    clips = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            clip = json.loads(line)
            clips.append({name: clip[name] for name in ("id", "file", "prompt")})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}, line {number} is no JSON object with id, file, prompt: {line[:60]}") from error
    if not clips:
        raise ConfigError(f"{file} is empty: write a line {{id, file, prompt}} for each video")
    return clips


def run(
    model: SpecVLM, directory: Path, clips: Iterable[dict[str, str]], sweep: Sequence[Method], **settings: Any
) -> Iterator[Result]:
    """Yield a Result per clip and method."""
    for clip in clips:
        source = str(directory / clip["file"])
        first = model.request(source, clip["prompt"], **settings)
        start = model.prefill(first, is_scored=True)
        reference = _generate(model, first, start)
        plain = _decode(model, start, first.config.replace(drafter="none"))[1]
        for method in sweep:
            request, ids = _decode(model, start, first.config.replace(**asdict(method), policy="fixed"))
            yield Result(
                clip["id"],
                **asdict(method),
                visual_tokens=start.prompt.num_visual,
                kept_visual_tokens=request.usage.kept_visual_tokens,
                completion_tokens=len(ids),
                target_passes=request.speculation.target_passes,
                rounds=request.speculation.rounds,
                accepted_tokens=request.speculation.accepted_tokens,
                is_plain=ids == plain,
                is_generate=ids == reference,
            )


def _decode(model: SpecVLM, start: Prefilled, config: EngineConfig) -> tuple[Request, list[int]]:
    start.session.rollback()
    request = Request(config, (), ())
    return request, [token for latest in model.decode(request, start) for token in latest.token_ids]


def _generate(model: SpecVLM, request: Request, start: Prefilled) -> list[int]:
    """Return what transformers' own generate() answers greedily, with its own attention, given the same inputs."""
    ids, num_new = start.inputs.input_ids, request.config.sampling.max_new_tokens
    with model.target.stock_attention():
        out = model.target.hf.generate(
            input_ids=ids[None], **start.inputs.model_kwargs, max_new_tokens=num_new, do_sample=False
        )
    new: list[int] = out[0, ids.shape[0] :].tolist()
    return new


# Two-sided 95 % quantiles of Student's t; between the listed degrees of freedom the smaller one's is used.
_T95 = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    7: 2.36,
    10: 2.23,
    15: 2.13,
    20: 2.09,
    30: 2.04,
    39: 2.02,
    60: 2.0,
}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval (0 for a single value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = _T95[max(freedom for freedom in _T95 if freedom <= count - 1)]
    return mean, quantile * math.sqrt(variance / count)


def table(results: Sequence[Result], command: str) -> str:
    """Return the Markdown page: MAT and target passes by pruner and ratio, paired differences, losslessness."""
    pages = []
    for tree in dict.fromkeys(result.tree for result in results):
        part = [result for result in results if result.tree == tree]
        pages += [f"## tree `{tree}`\n", _mat_table(part), _difference_table(part)]
    count = len({result.clip for result in results})
    below = "At keep_ratio 1 every pruner keeps every token, so `none` stands for all of them there.\n"
    same = sum(result.is_identical for result in results)
    head = [
        "# Acceptance by pruner and keep_ratio\n",
        f"{count} clips, mean ± 95 % interval over clips. Made by `{command}`.\n",
        f"Identical ids: {same} of {len(results)} answers equal plain decoding and transformers' generate().\n",
        below,
    ]
    return "\n".join(head + pages)


def _cells(results: Sequence[Result], value: str) -> dict[tuple[str, float], dict[str, float]]:
    """Return {(pruner, keep_ratio): {clip: value}}."""
    cells: dict[tuple[str, float], dict[str, float]] = {}
    for result in results:
        cells.setdefault((result.pruner, result.keep_ratio), {})[result.clip] = float(getattr(result, value))
    return cells


def _mat_table(results: Sequence[Result]) -> str:
    mat, passes = _cells(results, "mat"), _cells(results, "target_passes")
    full = interval(list(mat["none", 1.0].values()))[0]
    tokens = interval(list(_cells(results, "completion_tokens")["none", 1.0].values()))[0]
    lines = [
        f"A text has {tokens:.1f} tokens on average: as many target passes for plain decoding.\n",
        "| pruner | keep_ratio | MAT | of unpruned | target passes |",
        "|---|---|---|---|---|",
    ]
    for (pruner, ratio), values in mat.items():
        mean, half = interval(list(values.values()))
        passed, spread = interval(list(passes[pruner, ratio].values()))
        lines.append(
            f"| {pruner} | {ratio:g} | {mean:.2f} ± {half:.2f} | {mean / full:.0%} | {passed:.1f} ± {spread:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _difference_table(results: Sequence[Result]) -> str:
    mat = _cells(results, "mat")
    ratios = sorted({ratio for pruner, ratio in mat if pruner == "verifier"}, reverse=True)
    others = sorted({pruner for pruner, _ in mat} - {"verifier", "none"})
    lines = [
        "MAT of the verifier minus another pruner's, paired by clip; bold where the interval leaves out 0.\n",
        "| keep_ratio | " + " | ".join(others) + " |",
        "|---|" + "---|" * len(others),
    ]
    for ratio in ratios:
        row = []
        for other in others:
            ours, theirs = mat["verifier", ratio], mat[other, ratio]
            mean, half = interval([ours[clip] - theirs[clip] for clip in ours])
            text = f"{mean:+.2f} ± {half:.2f}"
            row.append(f"**{text}**" if abs(mean) > half else text)
        lines.append(f"| {ratio:g} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def record(results: Iterable[Result], out: str | None, page: str | None) -> list[Result]:
    """Collect the results, each written to `out` as it comes, and write the table to `page` or stdout.

    The first line of `out` is the provenance. Both files are opened before the first result is asked for.

    Raises:
        ConfigError: a file cannot be written.
    """
    command = command_line()
    collected = []
    with ExitStack() as files:
        lines, table_file = (files.enter_context(writable(name)) if name else None for name in (out, page))
        if lines:
            print(json.dumps(provenance(command)), file=lines, flush=True)
        for result in results:
            collected.append(result)
            if lines:
                print(json.dumps(asdict(result)), file=lines, flush=True)
        print(table(collected, command), file=table_file or sys.stdout, end="")
    return collected
