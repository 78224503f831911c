"""How fast is decoding, beside the least that its memory reads take and beside what others reach on the same device?

For every pair and number of visual tokens: one prefill, from which every method of this engine decodes in turn, and
transformers' generate() between them, so that all share the same minutes of the device. The first pass of each warms
up (kernels are compiled, CUDA graphs captured, passes timed for the policy) and is not counted. vLLM runs before the
pair is built, in a process of its own. Pairs are planted (planted.py) or real checkpoints. Drafts of other layers or
other bits come one after another, each built when its turn comes; what is compared with plain decoding to a few
percent (a planted draft that is hopeless) has plain decoding beside it.

    specvlm bench speed --out speed.jsonl --plots plots                          # every pair at 16,384 tokens
    specvlm bench speed --pairs qwen2.5-vl-32b/7b --visual-tokens 4096,65536     # a sweep
    specvlm bench speed --methods plain,auto --draft-quants none,fp8,int4        # a draft of fewer bits
    specvlm bench speed --methods auto --planted-drafts hopeless,changing        # a draft that is no good, or at times
    specvlm bench speed --target T --draft D --clips a.mp4 b.mp4                 # your own pair on your own films
    specvlm bench speed --pairs qwen2.5-vl-32b/7b --tiny --visual-tokens 64      # a check of the command on a CPU
    specvlm bench speed --answer-tokens 8,16,256 --draft-quants none,int4        # whole answers (answers.py)
    specvlm bench speed --from speed.jsonl --plots plots                         # table and plots of an earlier run

Methods: plain, chain and tree (fixed trees of the smaller model), auto (trees chosen round by round), self (the same,
drafted by the target's own layers), lookup, and the peers.

What the figures of a record mean (one JSON object per pair x method x visual_tokens x keep_ratio x tree x drafter x
draft_quant x planted_draft):

- ms_per_token: wall time from the first token to the last over the tokens after the first; pruning, the draft's
  prefill and what comes once (once_s) are left out. Median and percentiles over repeats. vLLM: the difference of two
  answer lengths.
- steps: single passes timed alone, on the prefilled sessions (steps.py); floor_ms is the bytes of language layers,
  output head and KV over read_gb_s, the device's read rate measured by a large sum. passes: the same by rows.
- over_plain: the time of an answer's decoding over plain decoding's in the same round of repeats, median.
- plain_share: of the target passes after the prefill, those that had nothing to verify. shapes, changes: what the
  policy chose (choices.py). All of them over all counted answers.
- once_s: seconds of timing passes and capturing graphs, in the answer that warms up.
- ttft_s: seconds by stage. read is the upload and normalisation of decoded frames. With a draft, prune and
  draft_prefill (its vision tower included) come after the first token and before the second; they are listed, too.
- end_to_end_s: the sum of ttft_s, and 255 more tokens at ms_per_token.
- peak_gib: of the device's allocator during prefills and the first answer, both models loaded, captures and compiling
  included (the draft's weights are added to the prefills', which run before it is built). weights_gib and kv_gib are
  parts of it; transformers' peaks hold this engine's session besides.
- follows_plant: every token is the planted one; null for real checkpoints and for vLLM, whose weights are dummies.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch

from specvlm.core import tree as trees_
from specvlm.core.config import EngineConfig
from specvlm.core.tree import MAX_NODES
from specvlm.engine.account import measure_peak, reset_peak
from specvlm.engine.api import SpecVLM
from specvlm.engine.request import Prefilled
from specvlm.runtime.session import Session
from specvlm.speculate.growth import round_passes
from specvlm_bench import choices, passes, peers, steps
from specvlm_bench.choices import Change, Chosen
from specvlm_bench.clips import PROMPT, Shown, shown_in
from specvlm_bench.hardware import kv_bytes, weight_bytes
from specvlm_bench.passes import Pass
from specvlm_bench.steps import Step
from specvlm_bench.subjects import Subject
from specvlm_bench.sweep import ENGINE_METHODS, Cell, Layers, Sweep

END_TO_END_TOKENS = 256
_GIB = 2**30
_MAY_STAY_PLAIN = ("auto", "self", "lookup")
_SCORED = {False: "unscored", True: "scored"}
Watch = Callable[[str], None]
T = TypeVar("T")


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
    visual_tokens: int
    method: str
    keep_ratio: float | None = None
    tree: str | None = None
    drafter: str | None = None
    draft_quant: str | None = None
    planted_draft: str | None = None
    shown: str | None = None  # what the models see: a film, or random frames
    ms_per_token: Spread | None = None
    steps: dict[str, Step] = field(default_factory=dict)
    passes: dict[str, list[Step]] = field(default_factory=dict)  # "verify" and "draft", by rows
    mean_accepted_length: float | None = None
    ttft_s: dict[str, float] = field(default_factory=dict)
    end_to_end_s: float | None = None
    peak_gib: float | None = None
    follows_plant: bool | None = None
    is_plain: bool | None = None  # the ids are those of this engine's plain decoding
    prompt_tokens: int | None = None
    kept_visual_tokens: int | None = None
    num_tokens: int | None = None
    round_ms: float | None = None  # a draft and its verification, of a fixed tree
    over_plain: float | None = None
    plain_share: float | None = None
    shapes: list[Chosen] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    once_s: dict[str, float] = field(default_factory=dict)
    prefill_s: dict[str, float] = field(default_factory=dict)  # scored and unscored, encoding left out
    weights_gib: float | None = None
    kv_gib: float | None = None  # what the method itself needs for prompt and answer
    answer_s: Spread | None = None  # of whole answers (answers.py); then nothing of single tokens is known
    answer_over_plain: Spread | None = None
    first_answer_s: float | None = None
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
    for shown in shown_in(sweep):
        for record in _at_length(subject, sweep, shown, read_gb_s, watch):
            yield replace(record, pair=shown.pair(record.pair), shown=str(shown))
        free_memory()


def _at_length(subject: Subject, sweep: Sweep, shown: Shown, read_gb_s: float, watch: Watch) -> Iterator[Record]:
    """Yield the records of one film or number of visual tokens; no memory of it is left afterwards."""
    label = f"{subject.name}, {shown.film or f'{shown.visual_tokens} visual tokens of random frames'}"
    watch(f"{label}: prefilling")
    prefills = attempt(partial(_prefill, SpecVLM(subject.target), shown, sweep))
    if isinstance(prefills, str):
        for cell in sweep.cells():
            yield failed(subject.name, cell, shown.visual_tokens, prefills)
        return
    length = _Length(subject, sweep, prefills, read_gb_s, label, watch)
    for layers, cells in sweep.groups():
        yield from length.records(layers, cells)
        peers.forget(subject.target)
        free_memory()


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
    return Record(pair, visual_tokens, **cell.names, error=problem)


def _prefill(model: SpecVLM, shown: Shown, sweep: Sweep) -> _Prefills:
    """Prefill scored and not scored in turn, each once to warm up; keep the last, a scored one."""
    frames = shown.frames(model.target.hf.config, model.target.device)
    common = {"max_new_tokens": sweep.num_tokens, "max_frames": len(frames.pixels), "drafter": "none"}
    times: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    device = model.target.device
    start, peak = None, 0
    for repeat in range(1 + sweep.slow_repeats):
        for is_scored in times:
            start = None  # frees the last one's keys and values
            request = model.request(frames, PROMPT, **common)
            reset_peak(device)
            start = model.prefill(request, is_scored=is_scored)
            peak = max(peak, measure_peak(device))
            if repeat > 0:
                times[is_scored].append({name: request.seconds[name] for name in ("read", "encode", "prefill")})
    assert start is not None
    stages = {is_scored: _medians(found) for is_scored, found in times.items()}
    placeholder = model.target.hf.config.video_token_id
    return _Prefills(start, stages, peak, int((start.inputs.input_ids == placeholder).sum()))


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(stages[name] for stages in found) for name in found[0]}


class _Length:
    """One pair at one number of visual tokens, and what its groups of cells share."""

    def __init__(
        self, subject: Subject, sweep: Sweep, prefills: _Prefills, read_gb_s: float, label: str, watch: Watch
    ) -> None:
        self.subject, self.sweep, self.prefills, self.read_gb_s = subject, sweep, prefills, read_gb_s
        self.label, self.watch = label, watch
        self.plain_ids: list[int] | None = None  # of the first plain answer
        self._verified: dict[int, Step] = {}

    def records(self, layers: Layers | None, cells: Sequence[Cell]) -> Iterator[Record]:
        """Build the drafts of a group, run its cells in turn, and yield their records."""
        if layers:
            self.watch(f"{self.label}: building {layers.drafter} {layers.quant or ''}")
        group = attempt(partial(_Group, self, layers, cells))
        if isinstance(group, str):
            for cell in cells:
                yield failed(self.subject.name, cell, self.prefills.visual_tokens, group)
        else:
            yield from group.records()

    def verified(self, rows: int) -> Step:
        """Return the time of a target pass of this many rows, measured once."""
        if rows not in self._verified:
            self._verified[rows] = steps.verify(self.prefills.start, rows, self.read_gb_s)
        return self._verified[rows]


def engines(subject: Subject, layers: Layers | None, cells: Sequence[Cell]) -> dict[Cell, SpecVLM]:
    """Return the engine of each cell: one a planted draft, all of these layers."""
    if layers is None:
        return dict.fromkeys(cells, SpecVLM(subject.target))
    own = "self" if layers.drafter == "self" else "published"
    drafts: dict[str | None, SpecVLM] = {}
    base = subject.draft(layers)
    for name in dict.fromkeys(cell.planted_draft for cell in cells):
        if name in (None, own) or subject.replanted is None:
            drafts[name] = SpecVLM(subject.target, base)
        else:
            drafts[name] = SpecVLM(subject.target, subject.replanted(base, str(name)))
    return {cell: drafts[cell.planted_draft] for cell in cells}


class _Group:
    """The cells whose drafts share their layers; plain decoding runs beside a hopeless draft in any case."""

    def __init__(self, length: _Length, layers: Layers | None, cells: Sequence[Cell]) -> None:
        self._length, self._sweep, self._start = length, length.sweep, length.prefills.start
        self._cells = cells
        is_alone = any(cell.planted_draft == "hopeless" for cell in cells) and Cell("plain") not in cells
        self._passes: dict[Cell, list[Pass]] = {cell: [] for cell in ([Cell("plain")] if is_alone else [])}
        self._passes |= {cell: [] for cell in cells}
        self._warm_ups: dict[Cell, Pass] = {}  # their peaks come before other engines have left anything behind
        self._problems: dict[Cell, str] = {}
        self._models = engines(length.subject, layers, tuple(self._passes))
        self._draft_sessions: dict[float | None, Session] = {}
        self._drafted: dict[tuple[float | None, ...], Step] = {}

    def records(self) -> Iterator[Record]:
        """Run all cells in turn, then yield their records."""
        label, watch, sweep = self._length.label, self._length.watch, self._sweep
        for repeat in range(1 + max(sweep.repeats, sweep.slow_repeats)):
            for cell in self._passes:
                count = sweep.repeats if cell.method in ENGINE_METHODS else sweep.slow_repeats
                if repeat <= count and cell not in self._problems:
                    watch(f"{label}: {cell}, {f'pass {repeat} of {count}' if repeat else 'warming up'}")
                    self._run(cell)
        for cell in self._cells:
            watch(f"{label}: {cell}, timing steps")
            problem = self._problems.get(cell)
            found = problem if problem is not None else attempt(partial(self._record, cell))
            if isinstance(found, str):
                found = failed(self._length.subject.name, cell, self._length.prefills.visual_tokens, found)
            yield found

    def _run(self, cell: Cell) -> None:
        found = attempt(partial(self._pass, cell))
        if isinstance(found, str):
            self._problems[cell] = found
        elif cell not in self._warm_ups:
            self._warm_ups[cell] = found
            if cell == Cell("plain") and self._length.plain_ids is None:
                self._length.plain_ids = found.token_ids
        else:
            self._passes[cell].append(found)

    def _pass(self, cell: Cell) -> Pass:
        if cell.method in ENGINE_METHODS:
            return passes.decode(self._models[cell], self._start, **cell.settings(self._sweep))
        return peers.generate(self._models[cell], self._start, cell.method, self._sweep.num_tokens)

    def _record(self, cell: Cell) -> Record:
        found, prefills = self._passes[cell], self._length.prefills
        peak, weights, kv = self._gib(cell, found)
        spread, ttft, last = Spread.of([one.ms_per_token for one in found]), self._ttft(cell, found), found[-1]
        decisions = [decision for one in found for decision in one.decisions]
        is_adaptive = cell.method in ("auto", "self")
        return Record(
            self._length.subject.name,
            prefills.visual_tokens,
            **cell.names,
            ms_per_token=spread,
            steps=self._timed_steps(cell),
            passes=self._timed_passes(cell),
            mean_accepted_length=last.mean_accepted_length,
            ttft_s=ttft,
            end_to_end_s=sum(ttft.values()) + (END_TO_END_TOKENS - 1) * spread.median / 1e3,
            peak_gib=peak,
            follows_plant=self._follows(found),
            is_plain=self._is_plain(found),
            prompt_tokens=len(self._start.prompt),
            kept_visual_tokens=last.kept_visual_tokens,
            num_tokens=len(last.token_ids),
            round_ms=_round_ms(found) if cell.tree else None,
            over_plain=self._over_plain(cell),
            plain_share=_plain_share(found) if cell.method in _MAY_STAY_PLAIN else None,
            shapes=choices.shapes(decisions) if is_adaptive else [],
            changes=self._changes(found) if cell.planted_draft == "changing" else [],
            once_s={name: self._warm_ups[cell].stages.get(name, 0.0) for name in ("calibrate", "capture")},
            prefill_s={name: prefills.stages[is_scored]["prefill"] for is_scored, name in _SCORED.items()},
            weights_gib=weights,
            kv_gib=kv,
        )

    def _ttft(self, cell: Cell, found: Sequence[Pass]) -> dict[str, float]:
        """Return the seconds of every stage before the second token."""
        is_pruned = cell.keep_ratio is not None
        stages = self._length.prefills.stages[is_pruned]
        later = _medians([one.stages for one in found])
        if cell.method in peers.PEERS:
            return {"read": stages["read"], **later}
        return stages | {name: later[name] for name in ("prune", "draft_prefill") if is_pruned}

    def _follows(self, found: Sequence[Pass]) -> bool | None:
        cycle, last = self._length.subject.cycle, int(self._start.inputs.input_ids[-1])
        return None if cycle is None else all(cycle.follows(last, one.token_ids) for one in found)

    def _is_plain(self, found: Sequence[Pass]) -> bool | None:
        ids = self._length.plain_ids
        return None if ids is None else all(one.token_ids == ids for one in found)

    def _over_plain(self, cell: Cell) -> float | None:
        plain = self._passes.get(Cell("plain"))
        if not plain or cell.method not in ENGINE_METHODS:
            return None
        pairs = zip(self._passes[cell], plain, strict=False)  # plain decoding may have failed on the way
        return statistics.median(one.decode_s / other.decode_s for one, other in pairs)

    def _changes(self, found: Sequence[Pass]) -> list[Change]:
        cycle = self._length.subject.cycle
        if cycle is None or not self._follows(found):
            return []
        good = [cycle.is_good(torch.tensor(one.token_ids)).tolist() for one in found]
        return [change for one, is_good in zip(found, good, strict=True)
                for change in choices.changes(is_good, one.decisions)]  # fmt: skip

    def _timed_steps(self, cell: Cell) -> dict[str, Step]:
        """Return the passes of a plain step or of a fixed tree."""
        if cell.method == "plain":
            return {"plain": self._length.verified(1)}
        if cell.tree is None:
            return {}
        verified = self._length.verified(len(trees_.parse(cell.tree)) + 1)
        return {"verify": verified, "draft": self._drafting(cell, round_passes(trees_.parse(cell.tree)))}

    def _timed_passes(self, cell: Cell) -> dict[str, list[Step]]:
        """Return the passes of which a chosen tree consists."""
        if cell.method not in ("auto", "self"):
            return {}
        return {
            "verify": [self._length.verified(rows) for rows in steps.VERIFIED_ROWS],
            "draft": [self._drafting(cell, [rows]) for rows in steps.DRAFTED_ROWS],
        }

    def _drafting(self, cell: Cell, rows: Sequence[int]) -> Step:
        """Return the mean time of a draft's passes of so many rows; what cells share is timed once."""
        ratio, key = cell.keep_ratio, (cell.keep_ratio, *rows)
        if ratio not in self._draft_sessions:
            config = EngineConfig().replace(**cell.settings(self._sweep))
            self._draft_sessions[ratio] = steps.draft_session(self._models[cell], self._start, config)
        if key not in self._drafted:
            self._drafted[key] = steps.draft(self._draft_sessions[ratio], rows, self._length.read_gb_s)
        return self._drafted[key]

    def _gib(self, cell: Cell, found: Sequence[Pass]) -> tuple[float, float, float]:
        """Return the peak, the weights and the keys and values, in GiB."""
        target = self._length.subject.target
        draft = self._models[cell].draft or target
        length, room = len(self._start.prompt), self._sweep.num_tokens + MAX_NODES
        kv, weights = kv_bytes(target, length + room), weight_bytes(target, draft)
        if found[-1].kept_visual_tokens is not None:
            kv += kv_bytes(draft, length - self._start.prompt.num_visual + found[-1].kept_visual_tokens + room)
        elif cell.method == "transformers-assisted":
            kv += kv_bytes(draft, length + room)
        peak = self._warm_ups[cell].peak_bytes
        if cell.method in ENGINE_METHODS:
            peak = max(peak, self._length.prefills.peak_bytes + weights - weight_bytes(target))
        return peak / _GIB, weights / _GIB, kv / _GIB


def _plain_share(found: Sequence[Pass]) -> float:
    """Return the share of the target passes after the prefill that had nothing to verify."""
    return 1 - sum(one.num_rounds for one in found) / sum(len(one.decisions) for one in found)


def _round_ms(found: Sequence[Pass]) -> float | None:
    """Return the median milliseconds of a round, None without drafting."""
    if found[-1].mean_accepted_length is None:
        return None
    return statistics.median(1e3 * one.decode_s / one.num_rounds for one in found)
