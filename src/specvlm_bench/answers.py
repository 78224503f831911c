"""How long does a whole answer take, from decoded frames in memory to its last word?

For every length of answer and every group of drafts: plain decoding and the other methods in turn, each a whole
`SpecVLM.generate()`, so that all which a user waits for is in it: vision, scoring, prefill, the draft's start, and
what decoding does on the way. Nothing else runs before, so the first answer of the first row is the process's own
first: kernels are compiled, graphs captured and passes timed in it. The first answer of every row stands apart
(first_answer_s) and is not counted.

What the figures of a record mean, beside those of speed.py:

- num_tokens: new tokens of the answers. first_answer_s: seconds of the row's first answer.
- answer_s: seconds of the later ones. answer_over_plain: each over plain decoding's answer in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from specvlm.core.clock import wait
from specvlm.engine.account import Generation
from specvlm.engine.api import SpecVLM
from specvlm.media import Frames
from specvlm_bench.clips import PROMPT, shown_in
from specvlm_bench.speed import Record, Spread, Watch, attempt, engines, failed, free_memory
from specvlm_bench.subjects import Subject
from specvlm_bench.sweep import Cell, Layers, Sweep

_PLAIN = Cell("plain")


@dataclass
class _Row:
    """The answers of one method at one length, the first of them apart."""

    first_s: float | None = None
    seconds: list[float] = field(default_factory=list)
    all_ids: set[tuple[int, ...]] = field(default_factory=set)
    last: Generation | None = None
    problem: str | None = None

    def add(self, seconds: float, answer: Generation) -> None:
        """Note an answer."""
        if self.first_s is None:
            self.first_s = seconds
        else:
            self.seconds.append(seconds)
        self.all_ids.add(answer.token_ids)
        self.last = answer


def measure(subject: Subject, sweep: Sweep, watch: Watch) -> Iterator[Record]:
    """Yield a Record a length of answer and cell, for all that is shown. What fails has an error; the rest goes on."""
    for shown in shown_in(sweep):
        watch(f"{subject.name}: making the frames")
        frames = attempt(partial(shown.frames, subject.target.hf.config, subject.target.device))
        for layers, cells in sweep.groups():
            for record in _records(subject, sweep, layers, cells, frames, watch):
                count = record.visual_tokens or shown.visual_tokens
                yield replace(record, pair=shown.pair(record.pair), visual_tokens=count, shown=str(shown))
            free_memory()


def _records(
    subject: Subject, sweep: Sweep, layers: Layers | None, cells: Sequence[Cell], frames: Frames | str, watch: Watch
) -> Iterator[Record]:
    """Yield the records of a group; no memory of its drafts is left afterwards. `frames` may be what went wrong."""
    watch(f"{subject.name}: building the models")
    group = frames if isinstance(frames, str) else attempt(partial(_Group, subject, sweep, layers, cells, frames))
    if isinstance(group, str):
        for cell in cells:
            yield failed(subject.name, cell, 0, group)
    else:
        yield from group.records(watch)


class _Group:
    """The cells whose drafts share their layers. Plain decoding, where it is asked for, runs beside each group."""

    def __init__(
        self, subject: Subject, sweep: Sweep, layers: Layers | None, cells: Sequence[Cell], frames: Frames
    ) -> None:
        self._subject, self._sweep, self._cells, self._frames = subject, sweep, cells, frames
        beside = [_PLAIN] if "plain" in sweep.methods and _PLAIN not in cells else []
        self._models = engines(subject, layers, [*beside, *cells])

    def records(self, watch: Watch) -> Iterator[Record]:
        """Answer in turn, then yield the records, the shortest answers first."""
        rows = {(count, cell): _Row() for count in self._sweep.answer_tokens for cell in self._models}
        for repeat in range(1 + self._sweep.repeats):
            for (count, cell), row in rows.items():
                if row.problem is None:
                    watch(f"{self._subject.name}: {cell}, {count} tokens, answer {repeat} of {self._sweep.repeats}")
                    answer = attempt(partial(self._answer, self._models[cell], cell, count))
                    if isinstance(answer, str):
                        row.problem = answer
                    else:
                        row.add(*answer)
        for (count, cell), row in rows.items():
            if cell in self._cells:
                yield self._record(cell, count, row, rows.get((count, _PLAIN)))

    def _answer(self, model: SpecVLM, cell: Cell, count: int) -> tuple[float, Generation]:
        """Return the seconds of a whole answer, and the answer."""
        settings = cell.settings(self._sweep) | {"max_new_tokens": count, "max_frames": len(self._frames.pixels)}
        wait(*model.devices)
        begin = time.perf_counter()
        answer = model.generate(self._frames, PROMPT, **settings)
        wait(*model.devices)
        return time.perf_counter() - begin, answer

    def _record(self, cell: Cell, count: int, row: _Row, plain: _Row | None) -> Record:
        if row.problem is not None or row.last is None:
            return failed(self._subject.name, cell, 0, f"{count} tokens: {row.problem}")
        usage, speculation = row.last.usage, row.last.speculation
        return Record(
            self._subject.name,
            usage.visual_tokens,
            **cell.names,
            mean_accepted_length=speculation.mean_accepted_length if speculation.rounds else None,
            follows_plant=self._follows(row),
            is_plain=None if plain is None or plain.problem else row.all_ids == plain.all_ids,
            prompt_tokens=usage.prompt_tokens,
            kept_visual_tokens=usage.kept_visual_tokens if speculation.rounds and cell.keep_ratio else None,
            num_tokens=usage.completion_tokens,
            answer_s=Spread.of(row.seconds),
            answer_over_plain=_over(row, plain),
            first_answer_s=row.first_s,
        )

    def _follows(self, row: _Row) -> bool | None:
        """Whether every answer is the planted text: each token follows from the one before."""
        cycle = self._subject.cycle
        return None if cycle is None else all(cycle.follows(ids[0], ids[1:]) for ids in row.all_ids)


def _over(row: _Row, plain: _Row | None) -> Spread | None:
    if plain is None or plain.problem is not None:
        return None
    return Spread.of([one / other for one, other in zip(row.seconds, plain.seconds, strict=True)])
