"""How fast is decoding, beside the least that its memory reads take and beside what others reach on the same device?

For every pair and number of visual tokens: one prefill, from which every method of this engine decodes in turn, and
transformers' generate() between them, so that all share the same minutes of the device. The first pass of each warms
up (kernels are compiled, CUDA graphs captured) and is not counted. vLLM runs before the pair is built, in a process of
its own. Pairs are planted (planted.py) or real checkpoints.

    specvlm bench speed --out speed.jsonl --plots plots                          # every pair at 16,384 tokens
    specvlm bench speed --pairs qwen2.5-vl-32b/7b --visual-tokens 4096,65536     # a sweep
    specvlm bench speed --target T --draft D                                     # your own pair
    specvlm bench speed --pairs qwen2.5-vl-32b/7b --tiny --visual-tokens 64      # a check of the command on a CPU
    specvlm bench speed --from speed.jsonl --plots plots                         # table and plots of an earlier run

What the figures of a record mean (one JSON object per pair x method x visual_tokens x keep_ratio x tree):

- ms_per_token: wall time from the first token to the last over the tokens after the first; pruning and the draft's
  prefill are left out. Median and percentiles over repeats. vLLM: the difference of two answer lengths.
- steps: single passes timed alone, on the prefilled sessions (steps.py); floor_ms is the bytes of language layers,
  output head and KV over read_gb_s, the device's read rate measured by a large sum.
- ttft_s: seconds by stage. read is the upload and normalisation of decoded frames. With a draft, prune and
  draft_prefill (its vision tower included) come after the first token and before the second; they are listed, too.
- end_to_end_s: the sum of ttft_s, and 255 more tokens at ms_per_token.
- peak_gib: of the device's allocator during prefills and the first answer, both models loaded, captures and compiling
  included. weights_gib and kv_gib are parts of it; transformers' peaks hold this engine's session besides.
- follows_plant: every token is the planted one; null for real checkpoints and for vLLM, whose weights are dummies.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from specvlm import tree as trees_
from specvlm.bench import passes, peers, steps
from specvlm.bench.clips import PROMPT, clip
from specvlm.bench.hardware import kv_bytes, weight_bytes
from specvlm.bench.passes import Pass
from specvlm.bench.steps import Step
from specvlm.bench.subjects import Subject
from specvlm.config import EngineConfig
from specvlm.engine import Prefilled, SpecVLM
from specvlm.errors import ConfigError
from specvlm.report import measure_peak, reset_peak
from specvlm.tree import MAX_NODES

ENGINE_METHODS = ("plain", "chain", "tree")
METHODS = (*ENGINE_METHODS, *peers.PEERS, "vllm-plain")
END_TO_END_TOKENS = 256
_GIB = 2**30
_SCORED = {False: "unscored", True: "scored"}
Watch = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Sweep:
    """What is measured, and how often."""

    visual_tokens: tuple[int, ...] = (16384,)
    keep_ratios: tuple[float, ...] = (0.1,)
    trees: tuple[str, ...] = ("paper", "chain:5")
    methods: tuple[str, ...] = METHODS
    num_tokens: int = 256
    repeats: int = 5
    slow_repeats: int = 2  # of prefills and of other engines' answers

    def __post_init__(self) -> None:
        for name in ("visual_tokens", "keep_ratios", "trees", "methods"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: name at least one")
        for name, least in (("num_tokens", 2), ("repeats", 1), ("slow_repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed: at least {least}")
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise ConfigError(f"method {unknown[0]!r} is not known: choose from {', '.join(METHODS)}")
        if low := [count for count in self.visual_tokens if count < 1]:
            raise ConfigError(f"visual_tokens={low[0]} is not allowed: at least 1")
        for ratio in self.keep_ratios:
            EngineConfig().replace(keep_ratio=ratio)
        for spec in self.trees:
            trees_.parse(spec)

    def cells(self) -> list[Cell]:
        """Return what is measured at one number of visual tokens, vLLM left out; this engine's methods come first."""
        found = []
        for method in self.methods:
            if method in ("chain", "tree"):
                chosen = [spec for spec in self.trees if spec.startswith("chain:") == (method == "chain")]
                found += [Cell(method, ratio, spec) for spec in chosen for ratio in self.keep_ratios]
            elif method != "vllm-plain":
                found.append(Cell(method))
        return sorted(found, key=lambda cell: cell.method not in ENGINE_METHODS)


@dataclass(frozen=True)
class Cell:
    """One method with its settings, which are None where it has none."""

    method: str
    keep_ratio: float | None = None
    tree: str | None = None

    def settings(self, sweep: Sweep) -> dict[str, Any]:
        """Return the engine's settings."""
        common = {"max_new_tokens": sweep.num_tokens, "repetition_penalty": 1.0}
        if self.method == "plain":
            return common | {"drafter": "none"}
        return common | {"drafter": "model", "pruner": "verifier", "keep_ratio": self.keep_ratio, "tree": self.tree}

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.method, self.tree, self.keep_ratio) if part is not None)


@dataclass(frozen=True)
class Spread:
    """Median and percentiles over repeats."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of one or more values, percentiles interpolated."""
        found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
        return Spread(*found.tolist())


@dataclass(frozen=True)
class Record:
    """One line of the results; see the module's docstring."""

    pair: str
    method: str
    visual_tokens: int
    keep_ratio: float | None
    tree: str | None
    ms_per_token: Spread | None = None
    steps: dict[str, Step] = field(default_factory=dict)
    mean_accepted_length: float | None = None
    ttft_s: dict[str, float] = field(default_factory=dict)
    end_to_end_s: float | None = None
    peak_gib: float | None = None
    follows_plant: bool | None = None
    is_plain: bool | None = None  # the ids are those of this engine's plain decoding
    prompt_tokens: int | None = None
    kept_visual_tokens: int | None = None
    num_tokens: int | None = None
    round_ms: float | None = None  # a draft and its verification
    prefill_s: dict[str, float] = field(default_factory=dict)  # scored and unscored, encoding left out
    weights_gib: float | None = None
    kv_gib: float | None = None  # what the method itself needs for prompt and answer
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class _Prefills:
    """Medians over the prefills of one video, and the last of them."""

    start: Prefilled
    stages: dict[bool, dict[str, float]]  # by whether the visual tokens were scored
    peak_bytes: int
    visual_tokens: int


def measure(subject: Subject, sweep: Sweep, read_gb_s: float, watch: Watch) -> Iterator[Record]:
    """Yield a Record a cell, for every number of visual tokens. A cell that fails has an error; the rest goes on."""
    for wanted in sweep.visual_tokens:
        yield from _at_length(subject, sweep, wanted, read_gb_s, watch)
        peers.forget(subject.model)
        free_memory()


def _at_length(subject: Subject, sweep: Sweep, wanted: int, read_gb_s: float, watch: Watch) -> Iterator[Record]:
    """Yield the records of one number of visual tokens; no memory of it is left afterwards."""
    label = f"{subject.name}, {wanted} visual tokens"
    watch(f"{label}: prefilling")
    prefills = attempt(partial(_prefill, subject.model, wanted, sweep))
    if isinstance(prefills, str):
        for cell in sweep.cells():
            yield failed(subject.name, cell, wanted, prefills)
    else:
        yield from _Length(subject, sweep, prefills, read_gb_s).records(label, watch)


def attempt(action: Callable[[], T]) -> T | str:
    """Return what an action returns, or what went wrong with it; then no memory of it is left.

    Whatever it is (a peer may fail in any way, memory may run out anywhere), the other measurements are worth having.
    """
    try:
        return action()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        problem = " ".join(f"{type(error).__name__}: {lines[0]}".split())[:300]
    free_memory()
    return problem


def free_memory() -> None:
    """Return what nothing refers to any more to the devices."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failed(pair: str, cell: Cell, visual_tokens: int, problem: str) -> Record:
    """Return the record of a cell that could not be measured."""
    return Record(pair, cell.method, visual_tokens, cell.keep_ratio, cell.tree, error=problem)


def _prefill(model: SpecVLM, visual_tokens: int, sweep: Sweep) -> _Prefills:
    """Prefill scored and not scored in turn, each once to warm up; keep the last, a scored one."""
    frames = clip(model.target.hf.config, visual_tokens, model.target.device)
    common = {"max_new_tokens": sweep.num_tokens, "max_frames": len(frames.pixels)}
    drafters = {False: "none", True: "model"}
    times: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    devices = {model.target.device, (model.draft or model.target).device}
    start, peak = None, 0
    for repeat in range(1 + sweep.slow_repeats):
        for is_scored, drafter in drafters.items():
            start = None  # frees the last one's keys and values
            request = model.request(frames, PROMPT, drafter=drafter, keep_ratio=min(sweep.keep_ratios), **common)
            reset_peak(*devices)
            start = model.prefill(request)
            peak = max(peak, measure_peak(*devices))
            if repeat > 0:
                times[is_scored].append({name: request.seconds[name] for name in ("read", "encode", "prefill")})
    assert start is not None
    stages = {is_scored: _medians(found) for is_scored, found in times.items()}
    placeholder = model.target.hf.config.video_token_id
    return _Prefills(start, stages, peak, int((start.inputs.input_ids == placeholder).sum()))


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(stages[name] for stages in found) for name in found[0]}


class _Length:
    """All cells of one pair at one number of visual tokens."""

    def __init__(self, subject: Subject, sweep: Sweep, prefills: _Prefills, read_gb_s: float) -> None:
        self._subject, self._sweep, self._prefills, self._read_gb_s = subject, sweep, prefills, read_gb_s
        self._model, self._start = subject.model, prefills.start
        self._passes: dict[Cell, list[Pass]] = {cell: [] for cell in sweep.cells()}
        self._problems: dict[Cell, str] = {}
        self._peaks: dict[Cell, int] = {}  # of the first pass, before other engines have left anything behind
        self._steps: dict[Any, Step] = {}

    def records(self, label: str, watch: Watch) -> Iterator[Record]:
        """Run all cells in turn, then yield their records."""
        for repeat in range(1 + max(self._sweep.repeats, self._sweep.slow_repeats)):
            for cell in self._passes:
                count = self._sweep.repeats if cell.method in ENGINE_METHODS else self._sweep.slow_repeats
                if repeat <= count and cell not in self._problems:
                    watch(f"{label}: {cell}, {f'pass {repeat} of {count}' if repeat else 'warming up'}")
                    self._run(cell, is_counted=repeat > 0)
        for cell in self._passes:
            watch(f"{label}: {cell}, timing steps")
            problem = self._problems.get(cell)
            found = problem if problem is not None else attempt(partial(self._record, cell))
            if isinstance(found, str):
                found = failed(self._subject.name, cell, self._prefills.visual_tokens, found)
            yield found

    def _run(self, cell: Cell, *, is_counted: bool) -> None:
        found = attempt(partial(self._pass, cell))
        if isinstance(found, str):
            self._problems[cell] = found
            return
        self._peaks.setdefault(cell, found.peak_bytes)
        if is_counted:
            self._passes[cell].append(found)

    def _pass(self, cell: Cell) -> Pass:
        if cell.method in ENGINE_METHODS:
            return passes.decode(self._model, self._start, **cell.settings(self._sweep))
        return peers.generate(self._model, self._start, cell.method, self._sweep.num_tokens)

    def _record(self, cell: Cell) -> Record:
        found = self._passes[cell]
        peak, weights, kv = self._gib(cell, found)
        spread, ttft, last = Spread.of([one.ms_per_token for one in found]), self._ttft(cell, found), found[-1]
        prefill = {name: self._prefills.stages[is_scored]["prefill"] for is_scored, name in _SCORED.items()}
        return Record(
            self._subject.name,
            cell.method,
            self._prefills.visual_tokens,
            cell.keep_ratio,
            cell.tree,
            ms_per_token=spread,
            steps=self._timed_steps(cell),
            mean_accepted_length=last.mean_accepted_length,
            ttft_s=ttft,
            end_to_end_s=sum(ttft.values()) + (END_TO_END_TOKENS - 1) * spread.median / 1e3,
            peak_gib=peak,
            follows_plant=self._follows(found),
            is_plain=self._is_plain(found),
            prompt_tokens=len(self._start.prompt),
            kept_visual_tokens=last.kept_visual_tokens,
            num_tokens=len(last.token_ids),
            round_ms=_round_ms(found),
            prefill_s=prefill,
            weights_gib=weights,
            kv_gib=kv,
        )

    def _ttft(self, cell: Cell, found: Sequence[Pass]) -> dict[str, float]:
        """Return the seconds of every stage before the second token."""
        stages = self._prefills.stages[cell.method in ("chain", "tree")]
        later = _medians([one.stages for one in found])
        if cell.method in peers.PEERS:
            return {"read": stages["read"], **later}
        return stages | {name: later[name] for name in ("prune", "draft_prefill") if cell.method != "plain"}

    def _follows(self, found: Sequence[Pass]) -> bool | None:
        cycle, last = self._subject.cycle, int(self._start.inputs.input_ids[-1])
        return None if cycle is None else all(cycle.follows(last, one.token_ids) for one in found)

    def _is_plain(self, found: Sequence[Pass]) -> bool | None:
        plain = self._passes.get(Cell("plain"))
        return all(one.token_ids == plain[-1].token_ids for one in found) if plain else None

    def _timed_steps(self, cell: Cell) -> dict[str, Step]:
        """Return the cell's kinds of steps; what cells share is timed once."""
        if cell.method == "plain":
            return {"plain": self._step("plain", lambda: steps.plain(self._start, self._read_gb_s))}
        if cell.tree is None:
            return {}
        spec, config = cell.tree, EngineConfig().replace(**cell.settings(self._sweep))
        draft = lambda: steps.draft(self._model, self._start, config, self._read_gb_s)  # noqa: E731
        return {
            "verify": self._step(spec, lambda: steps.verify(self._start, spec, self._read_gb_s)),
            "draft": self._step(cell, draft),
        }

    def _step(self, key: Any, time: Callable[[], Step]) -> Step:
        if key not in self._steps:
            self._steps[key] = time()
        return self._steps[key]

    def _gib(self, cell: Cell, found: Sequence[Pass]) -> tuple[float, float, float]:
        """Return the peak, the weights and the keys and values, in GiB."""
        target, draft = self._model.target, self._model.draft or self._model.target
        length, room = len(self._start.prompt), self._sweep.num_tokens + MAX_NODES
        kv = kv_bytes(target, length + room)
        if found[-1].kept_visual_tokens is not None:
            kv += kv_bytes(draft, length - self._start.prompt.num_visual + found[-1].kept_visual_tokens + room)
        elif cell.method == "transformers-assisted":
            kv += kv_bytes(draft, length + room)
        peak = self._peaks[cell]
        if cell.method in ENGINE_METHODS:
            peak = max(peak, self._prefills.peak_bytes)
        return peak / _GIB, weight_bytes(target, draft) / _GIB, kv / _GIB


def _round_ms(found: Sequence[Pass]) -> float | None:
    """Return the median milliseconds of a round, None without drafting."""
    if found[-1].mean_accepted_length is None:
        return None
    return statistics.median(1e3 * one.decode_s / one.num_rounds for one in found)
