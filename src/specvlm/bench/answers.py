"""Does drafting pay from end to end? Whole requests on real clips, from the file to the last token.

Every clip is answered by every method, in random order within each repeat, through `generate`: reading, both prefills,
pruning, the timing of passes and all decoding count. Before that each method answers the first clip once, which is not
counted: libraries load, kernels compile and the policy times its passes then, as in a server's first request.

    specvlm bench speed --clips                                 # the bundled pair on its 40 held-out clips
    specvlm bench speed --clips DIR --target T --draft D        # DIR/clips.jsonl: a line {"id", "file", "prompt"} each

Of each clip and method the fastest repeat is compared with plain decoding's fastest: what disturbs a machine only adds.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specvlm.account import Generation
from specvlm.bench.provenance import written
from specvlm.engine import SpecVLM
from specvlm.errors import ConfigError

METHODS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"drafter": "none"},
    "tree": {"drafter": "model", "policy": "fixed"},  # and a tree
    "auto": {"drafter": "model", "tree": "dynamic", "policy": "auto"},
    "lookup": {"drafter": "lookup", "tree": "dynamic", "policy": "auto"},
}
DEFAULT_METHODS = ("plain", "tree", "auto")
SLOWER = 0.03  # of plain decoding's time, from which on a clip counts as slower


@dataclass
class Answers:
    """One clip under one method, a value each repeat."""

    clip: str
    method: str
    seconds: list[float] = field(default_factory=list)  # end to end
    decode_ms: list[float] = field(default_factory=list)  # a token after the first, what comes once left out
    target_passes: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    accepted_tokens: list[int] = field(default_factory=list)
    completion_tokens: int = 0
    is_identical: bool = True  # the ids of all repeats are those of plain decoding

    @property
    def mat(self) -> float:
        """Accepted draft tokens a round, without the bonus token."""
        return sum(self.accepted_tokens) / max(1, sum(self.rounds))

    def add(self, generation: Generation, seconds: float, plain_ids: Sequence[int]) -> None:
        """Add a repeat."""
        count, speculation = generation.usage.completion_tokens, generation.speculation
        self.seconds.append(seconds)
        self.decode_ms.append(1e3 * generation.seconds["decode"] / max(1, count - 1))
        self.target_passes.append(speculation.target_passes)
        self.rounds.append(speculation.rounds)
        self.accepted_tokens.append(speculation.accepted_tokens)
        self.completion_tokens = count
        self.is_identical &= list(generation.token_ids) == list(plain_ids)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"mean_accepted_length": self.mat}


def settings_of(methods: Sequence[str], **settings: Any) -> dict[str, dict[str, Any]]:
    """Return the settings of each method, beside those that all share; `tree` is that of the method "tree".

    Raises:
        ConfigError: a method is unknown, or plain decoding, which all are compared with, is not among them.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise ConfigError(f"method {unknown[0]!r} is not known with --clips: choose from {', '.join(METHODS)}")
    if "plain" not in methods:
        raise ConfigError(
            f"methods={','.join(methods)!r} is not allowed with --clips: plain is what all are compared with"
        )
    return {method: {**settings, **METHODS[method]} for method in dict.fromkeys(methods)}


def run(
    model: SpecVLM,
    directory: Path,
    clips: Sequence[Mapping[str, str]],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    repeats: int,
    watch: Callable[[str], None],
) -> Iterator[Answers]:
    """Yield the answers of each clip under each method.

    Args:
        model: the pair.
        directory: where the clips' files are.
        clips: {id, file, prompt} each.
        methods: settings by name, "plain" among them.
        repeats: counted answers of a clip and method.
        watch: told what is going on.
    """

    def answer(clip: Mapping[str, str], method: str) -> tuple[Generation, float]:
        begin = time.perf_counter()
        generation = model.generate(str(directory / clip["file"]), clip["prompt"], **methods[method])
        return generation, time.perf_counter() - begin

    watch("warming up")
    for method in methods:
        answer(clips[0], method)
    dice = random.Random(0)
    for number, clip in enumerate(clips, 1):
        order = [method for _ in range(repeats) for method in dice.sample(list(methods), len(methods))]
        timed = []
        for place, method in enumerate(order, 1):
            watch(f"clip {number} of {len(clips)}: answer {place} of {len(order)}, {method}")
            timed.append((method, *answer(clip, method)))
        plain_ids = next(generation.token_ids for method, generation, _ in timed if method == "plain")
        found = {method: Answers(clip["id"], method) for method in methods}
        for method, generation, seconds in timed:
            found[method].add(generation, seconds, plain_ids)
        yield from found.values()


def table(lines: Sequence[Mapping[str, Any]], origin: Mapping[str, Any]) -> str:
    """Return the Markdown page: each method beside plain decoding, over the clips."""
    answers: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        answers.setdefault(line["method"], {})[line["clip"]] = line
    plain = answers["plain"]
    repeats = len(next(iter(plain.values()))["seconds"])
    head = (
        f"{len(plain)} clips, the fastest of {repeats} answers each, from the file to the last token; one answer of "
        f"each method before was not counted. Made by `{origin['command']}`.\n"
    )
    names = ("method", "s", "speedup, median", "worst clip", f"clips slower by {SLOWER:.0%}", "speedup a token, median",
             "target passes", "MAT", "identical")  # fmt: skip
    rows = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    rows += [f"| {' | '.join(_row(method, found, plain))} |" for method, found in answers.items()]
    return "\n".join([head, *rows]) + "\n"


def _row(method: str, found: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Mapping[str, Any]]) -> list[str]:
    both = {clip: (found[clip], plain[clip]) for clip in found if clip in plain}
    whole = {clip: min(other["seconds"]) / min(one["seconds"]) for clip, (one, other) in both.items()}
    token = [min(other["decode_ms"]) / min(one["decode_ms"]) for one, other in both.values() if min(one["decode_ms"])]
    worst = min(whole, key=lambda clip: whole[clip])
    slower = sum(1 / gain > 1 + SLOWER for gain in whole.values())
    lines = list(found.values())
    return [
        method,
        f"{statistics.median(min(line['seconds']) for line in lines):.3f}",
        f"{statistics.median(whole.values()):.3f}",
        f"{whole[worst]:.3f} ({worst})",
        f"{slower} of {len(whole)}",
        f"{statistics.median(token):.3f}" if token else "",
        f"{statistics.fmean(statistics.fmean(line['target_passes']) for line in lines):.1f}",
        f"{statistics.fmean(line['mean_accepted_length'] for line in lines):.2f}" if any(_rounds(lines)) else "",
        f"{sum(line['is_identical'] for line in lines)} of {len(lines)}",
    ]


def _rounds(lines: Iterable[Mapping[str, Any]]) -> list[int]:
    return [sum(line["rounds"]) for line in lines]


def write(answers: Iterable[Answers], origin: Mapping[str, Any], out: str | None) -> Iterator[dict[str, Any]]:
    """Return the answers as plain JSON types, each written to `out` as it comes, after a line of provenance.

    Raises:
        ConfigError: `out` cannot be written; found before anything is measured.
    """
    return written(answers, out, origin)


def read(names: Sequence[str]) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:
    """Return the lines of the one file that is named, which `write` wrote, and its provenance.

    Raises:
        ConfigError: it cannot be read or is no such file, or there are several.
    """
    if len(names) > 1:
        raise ConfigError(f"{names[1]} is one file too many: the answers of one run make a table")
    try:
        origin, *lines = [json.loads(line) for line in Path(names[0]).read_text(encoding="utf-8").splitlines()]
        _ = origin["command"], [(line["clip"], line["method"], line["seconds"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{names[0]} cannot be read ({type(error).__name__}: {error})"
        raise ConfigError(f"{problem}: give a file of bench speed --clips --out") from error
    return iter(lines), origin
