"""The quality bench: every method answers every sample; what it took, and whether the words are plain decoding's.

The protocol:

- Before anything counts, each method answers one sample: libraries load, kernels compile, graphs are captured, the
  policy times its passes.
- A sample's methods run one after another in random order, so that nothing favours one of them; each is a whole
  request, from the file to the last word, its stages timed to the end of the device's work.
- All are counted alike: new tokens without and with the end-of-sequence token; a round is a target pass that verifies
  drafted tokens; a token's time is that of those after the first, pruning and the draft's prefill included. What comes
  once for a length (timing passes, capturing graphs) is left out of it and stands in the stages and the whole.
- Every answer is compared with plain decoding's. Where they part, the place is noted, and how near the two tokens'
  logits were when plain decoding chose.
- Each answer is one line of the journal, written before the next begins. A killed run goes on where it stopped, in the
  same order; what failed is tried again.

Untimed runs read, encode and prefill a sample once for all methods with the same settings of that: the counts are the
same, the times would mean little and are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
import warnings
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from specvlm import prune
from specvlm.check import reference
from specvlm.check.compare import Difference, first_difference, ms_a_token
from specvlm.check.inspect import inspect
from specvlm.check.ties import logit_gap
from specvlm.core.clock import wait
from specvlm.core.config import SamplingConfig, VideoConfig
from specvlm.core.errors import ConfigError, SpecVLMError, SpecVLMWarning, memory_errors, one_line
from specvlm.engine.account import Generation, Speculation, measure_peak, reset_peak
from specvlm.engine.api import SpecVLM
from specvlm.engine.pair import bundled
from specvlm.engine.request import Prefilled, Request
from specvlm.speculate import drafters as drafting
from specvlm_bench.data import Data, Sample
from specvlm_bench.hardware import gpu_name
from specvlm_bench.journal import PLAIN, Journal, Line
from specvlm_bench.methods import GENERATE
from specvlm_bench.provenance import command_line, provenance


class QualityWarning(SpecVLMWarning):
    """Something beside the answers that a run had to leave out."""


# what decides the text: a method that had it to itself could not be compared
_SHARED = {setting.name for part in (VideoConfig, SamplingConfig) for setting in fields(part)}
_TRIES = 3  # samples that a warm-up tries, should the first ones fail
_GENERATES = ("max_new_tokens", "repetition_penalty")  # settings of the text that generate() is given as well


@dataclass(frozen=True)
class Protocol:
    """What is run on every sample."""

    methods: Mapping[str, Mapping[str, Any]]  # settings by name, beside the shared ones
    settings: Mapping[str, Any]  # of all methods
    seed: int = 0  # of the order
    is_timed: bool = True
    num_overlays: int = 3  # samples whose kept visual tokens are drawn
    loaded: Mapping[str, str] = field(default_factory=dict)  # checksums of files that registered pruners or drafters


def origin(model: SpecVLM, data: Data, protocol: Protocol) -> Line:
    """Return the journal's first line: what is run, on what. A run goes on only where all but the command agree."""
    models = model.models
    return {
        **provenance(command_line()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": data.name,
        "samples": len(data.samples),
        "samples_sha256": _checksum(data),
        **{name: _without_folder(models[name]) for name in ("target", "draft")},
        **{name: models[name] for name in ("device", "draft_device", "draft_quant", "dtype")},
        "gpu": gpu_name(model.target.device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **asdict(protocol),
    }


def _checksum(data: Data) -> str:
    """Return what changes with any sample: a run goes on with the same questions only."""
    told = [[sample.id, str(sample.video), sample.prompt, dict(sample.settings)] for sample in data.samples]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _without_folder(name: str | None) -> str | None:
    """Return a model's name; the bundled ones are the same wherever they lie."""
    home = str(Path(bundled("target")).parent.parent)
    return name if name is None else name.removeprefix(home + os.sep)


def check(model: SpecVLM, protocol: Protocol) -> None:
    """Refuse what cannot be run, before any work.

    Raises:
        ConfigError: a method's settings are not allowed, or generate() cannot be given the shared ones.
    """
    for name, settings in protocol.methods.items():
        if wrong := sorted(settings.keys() & _SHARED):
            raise ConfigError(f"{wrong[0]} of method {name!r} is not allowed: all methods share it; give it to the run")
        if "keep_ratio" in settings and protocol.settings.get("keep_tokens") is not None:
            raise ConfigError(
                f"keep_tokens is not allowed beside method {name!r}, which has a keep_ratio: leave one out"
            )
        config = model.request(None, **{**protocol.settings, **settings}).config
        is_plain = drafting.drafter_class(config.draft, model.draft) is drafting.DRAFTERS["none"]
        if is_plain and config.draft.drafter != "none":
            raise ConfigError(f"method {name!r} needs a draft: give --draft, or leave the method out")
    told = {setting.name: setting.default for setting in fields(SamplingConfig) if setting.name not in _GENERATES}
    wrong = sorted(name for name, usual in told.items() if protocol.settings.get(name, usual) != usual)
    if GENERATE in protocol.methods and wrong:
        raise ConfigError(
            f"{wrong[0]} is not allowed beside the method {GENERATE!r}, which answers greedily: leave one out"
        )


def run(
    model: SpecVLM, data: Data, protocol: Protocol, journal: Journal, watch: Callable[[str], None] = lambda text: None
) -> list[Line]:
    """Answer what the journal does not hold yet.

    Args:
        model: the pair.
        data: the samples, and what is wrong with others.
        protocol: the methods.
        journal: where the answers go.
        watch: told how far it is and how long it will take.

    Returns:
        What the journal holds then, but the lines of kind "run".
    """
    said = [line["where"] for line in journal.lines if line["kind"] == "problem"]
    for problem in data.problems:
        if problem.where not in said:
            journal.write({"kind": "problem", **asdict(problem)})
    runner = _Runner(model, protocol, journal, watch)
    left = [(sample, name) for sample in data.samples for name in runner.left(sample)]
    if left and protocol.is_timed:
        runner.warm_up(left)
    runner.begin(len(left))
    for number, sample in enumerate(data.samples):
        runner.answer(sample)
        runner.judge(sample)
        if number < protocol.num_overlays:
            runner.draw(sample)
    return journal.lines


class _Runner:
    """Answers samples by all methods, judges the answers, draws what was kept; what the journal holds is not redone."""

    def __init__(self, model: SpecVLM, protocol: Protocol, journal: Journal, watch: Callable[[str], None]) -> None:
        self._model, self._protocol, self._journal, self._watch = model, protocol, journal, watch
        self._ids: dict[tuple[str, str], tuple[int, ...]] = {}  # of answers, by sample and method
        self._known: dict[str, set[tuple[str, str]]] = {}  # kind of line: samples and methods
        for line in journal.lines:
            self._learn(line)

    def _learn(self, line: Line) -> None:
        if "sample" not in line:
            return
        key = (line["sample"], line["method"])
        self._known.setdefault(line["kind"], set()).add(key)
        if line["kind"] == "answer":
            self._ids[key] = tuple(line["token_ids"])

    def _has(self, sample: Sample, name: str, kind: str) -> bool:
        return (sample.id, name) in self._known.get(kind, ())

    def _write(self, kind: str, sample: Sample, name: str, content: Mapping[str, Any]) -> None:
        line = {"kind": kind, "sample": sample.id, "method": name, **content}
        self._journal.write(line)
        self._learn(line)

    def left(self, sample: Sample) -> dict[str, int]:
        """Return the methods that have not answered and their places in the sample's random order.

        The order is the same at every start.
        """
        names = list(self._protocol.methods)
        order = random.Random(f"{self._protocol.seed} {sample.id}").sample(names, len(names))
        places = {name: place for place, name in enumerate(order, 1)}
        return {name: place for name, place in places.items() if not self._has(sample, name, "answer")}

    def warm_up(self, left: Sequence[tuple[Sample, str]]) -> None:
        """Let each method that has something left answer a sample, and count nothing."""
        for name in dict.fromkeys(name for _, name in left):
            for sample in [sample for sample, other in left if other == name][:_TRIES]:
                self._watch(f"warming up: {name}")
                try:
                    with memory_errors():
                        self._answered(sample, name, _Prefills(self._model, is_shared=False))
                    break
                except SpecVLMError:  # told where its turn comes
                    continue

    def begin(self, total: int) -> None:
        """Start the clock that says how long `total` answers will take."""
        self._total, self._done, self._begin = total, 0, time.monotonic()

    def _show(self, text: str) -> None:
        left = ""
        if self._done:
            seconds = (time.monotonic() - self._begin) / self._done * (self._total - self._done)
            left = f", about {_duration(seconds)} left"
        self._watch(f"{self._done} of {self._total} answers{left}: {text}")

    def answer(self, sample: Sample) -> None:
        """Answer by every method that has not."""
        prefills = _Prefills(self._model, is_shared=not self._protocol.is_timed)
        for name, place in self.left(sample).items():
            self._show(f"{sample.id}, {name}")
            key = {"video": sample.group, "prompt": sample.prompt, "place": place}
            try:
                with memory_errors():
                    found = self._answered(sample, name, prefills)
                self._write("answer", sample, name, key | found)
            except SpecVLMError as error:
                self._write("failure", sample, name, key | {"text": one_line(error)})
            self._done += 1

    def judge(self, sample: Sample) -> None:
        """Note where an answer parts from plain decoding's."""
        plain = self._ids.get((sample.id, PLAIN))
        for name in self._protocol.methods:
            ids = self._ids.get((sample.id, name))
            if plain is None or ids is None or ids == plain or self._has(sample, name, "difference"):
                continue
            found = first_difference(plain, ids, self._model)
            assert found is not None
            content = {
                "index": found.index,
                "plain_token": found.plain,
                "other_token": found.speculative,
                "plain_text": found.plain_text,
                "other_text": found.speculative_text,
                "gap": self._gap(sample, found),
            }
            self._write("difference", sample, name, content)

    def _gap(self, sample: Sample, found: Difference) -> float | None:
        try:
            with memory_errors():
                return logit_gap(self._model, self._request(sample, PLAIN), found)
        except SpecVLMError as error:
            warnings.warn(f"the logit gap of {sample.id} is not known: {error}", QualityWarning, stacklevel=2)
            return None

    def draw(self, sample: Sample) -> None:
        """Draw what each way of pruning keeps, once each."""
        drawn: dict[Hashable, Mapping[str, Any]] = {}
        for name in self._protocol.methods:
            request = self._request(sample, name)
            config, is_answered = request.config, (sample.id, name) in self._ids
            is_pruned = name != GENERATE and drafting.drafter_class(config.draft, self._model.draft).prunes
            is_wanted = is_pruned and is_answered and not prune.keeps_all(config.prune)
            if not is_wanted or self._has(sample, name, "overlay"):
                continue
            if config.prune not in drawn:
                self._show(f"{sample.id}, drawing what {name} kept")
                try:
                    with memory_errors():
                        drawn[config.prune] = self._drawn(sample, name)
                except SpecVLMError as error:
                    warnings.warn(
                        f"what {name} kept of {sample.id} is not drawn: {error}", QualityWarning, stacklevel=2
                    )
                    return
            self._write("overlay", sample, name, drawn[config.prune])

    def _drawn(self, sample: Sample, name: str) -> dict[str, Any]:
        found = inspect(self._model, sample.video, sample.prompt, **self._settings(sample, name))
        file = self._journal.directory / "overlays" / f"{_slug(sample.id)}--{_slug(name)}.png"
        file.parent.mkdir(exist_ok=True)
        found.save(str(file))
        return {
            "file": f"overlays/{file.name}",
            "summary": found.summary(),
            "attention_kept": found.mass,
            "kept_visual_tokens": len(found.keep),
        }

    def _settings(self, sample: Sample, name: str) -> dict[str, Any]:
        settings = {**self._protocol.settings, **self._protocol.methods[name], **sample.settings}
        if settings.get("temperature", 0) > 0:
            settings.setdefault("seed", 0)  # the same noise for all methods, so that all texts are the same
        return settings

    def _request(self, sample: Sample, name: str) -> Request:
        return self._model.request(sample.video, sample.prompt, **self._settings(sample, name))

    def _answered(self, sample: Sample, name: str, prefills: _Prefills) -> Line:
        """Return what one method made of one sample."""
        request, is_timed = self._request(sample, name), self._protocol.is_timed
        wait(*self._model.devices)  # what the answer before left running is not this one's
        if name == GENERATE:
            return _generated(self._model, request, is_timed=is_timed)
        generation = self._model.generate_request(request, start=prefills.start(request))
        return _line(self._model, generation, is_timed=is_timed)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _slug(name: str) -> str:
    """Return a name as part of a file's; what was changed leaves its mark, so that no two become one."""
    slug = re.sub(r"[^A-Za-z0-9@._-]+", "-", name)[:80]
    return slug if slug == name else f"{slug}-{zlib.crc32(name.encode()):08x}"


class _Prefills:
    """The prefills of one sample, each for all methods that would make the same."""

    def __init__(self, model: SpecVLM, *, is_shared: bool) -> None:
        self._model = model
        self._is_shared = is_shared
        self._starts: dict[Hashable, Prefilled] = {}

    def start(self, request: Request) -> Prefilled | None:
        """Return the prefill that a request can begin with, None where each makes its own."""
        if not self._is_shared:
            return None
        config = request.config
        scoring = (config.prune.score_rows, config.prune.score_layers)
        key = (config.video, scoring, config.run, config.sampling.max_new_tokens)
        if key not in self._starts:
            other = Request(config, request.messages, request.media)  # takes the account, which nobody reads
            self._starts[key] = self._model.prefill(other, is_scored=True)
        self._starts[key].session.rollback()
        return self._starts[key]


def _line(model: SpecVLM, generation: Generation, *, is_timed: bool) -> Line:
    usage, speculation = generation.usage, generation.speculation
    is_pruned = usage.kept_visual_tokens > 0
    per_pass = [1, *(decision.num_tokens for decision in generation.decisions)]
    per_pass[-1] -= sum(per_pass) - len(generation.token_ids)  # a stop string cuts the last
    times: Line = {
        "seconds": generation.seconds.to_dict(),
        "ms_per_token": ms_a_token(generation) or None,
        "peak_memory_bytes": generation.peak_memory_bytes,
    }
    return {
        **_counted(model, generation.text, generation.token_ids, generation.finish_reason),
        "prompt_tokens": usage.prompt_tokens,
        "visual_tokens": usage.visual_tokens,
        "kept_visual_tokens": usage.kept_visual_tokens if is_pruned else None,
        **_speculated(speculation),
        "drafted_per_pass": [0, *(decision.num_drafted for decision in generation.decisions)],
        "tokens_per_pass": per_pass,
        **(times if is_timed else dict.fromkeys(times)),
    }


def _speculated(speculation: Speculation) -> Line:
    return {
        **asdict(speculation),
        "mean_accepted_length": speculation.mean_accepted_length,
        "acceptance_length": speculation.acceptance_length,
    }


def _counted(model: SpecVLM, text: str, token_ids: Sequence[int], finish_reason: str) -> Line:
    has_end = bool(token_ids) and token_ids[-1] in model.target.eos_ids
    return {
        "text": text,
        "token_ids": list(token_ids),
        "finish_reason": finish_reason,
        "new_tokens": len(token_ids) - has_end,
        "new_tokens_with_eos": len(token_ids),
    }


def _generated(model: SpecVLM, request: Request, *, is_timed: bool) -> Line:
    """Return transformers' own answer. Its prefill holds the encoding of the frames."""
    sampling, target = request.config.sampling, model.target
    reset_peak(*model.devices)
    begin = time.perf_counter()
    inputs = model.read(request)
    wait(*model.devices)
    read = time.perf_counter() - begin
    num_new, penalty = sampling.max_new_tokens, sampling.repetition_penalty
    found = reference.generate(target, inputs, max_new_tokens=num_new, repetition_penalty=penalty)
    first, last = (found.arrivals[place][0] for place in (0, -1))
    ids = found.token_ids
    reason = "stop" if ids[-1] in target.eos_ids else "length"
    seconds = {"read": read, "prefill": first, "decode": last - first, "time_to_first_token": read + first}
    times = {
        "seconds": seconds | {"total": read + last},
        "ms_per_token": 1e3 * (last - first) / (len(ids) - 1) if len(ids) > 1 else None,
        "peak_memory_bytes": measure_peak(*model.devices),
    }
    text = target.tokenizer.decode([token for token in ids if token not in target.eos_ids])
    return {
        **_counted(model, text, ids, reason),
        "prompt_tokens": inputs.input_ids.shape[0],
        "visual_tokens": None,
        "kept_visual_tokens": None,
        **_speculated(Speculation(target_passes=len(ids))),
        "drafted_per_pass": [0] * len(ids),
        "tokens_per_pass": [1] * len(ids),
        **(times if is_timed else dict.fromkeys(times)),
    }
