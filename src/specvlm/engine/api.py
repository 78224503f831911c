"""The method: prefill, then propose / verify / accept / commit. rounds() -> stream() -> generate().

rounds() is the loop, one item a target pass; stream() turns tokens into text; generate() collects it.
"""

from __future__ import annotations

import os
import secrets
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specvlm import media, prune
from specvlm.core import tree
from specvlm.core.ambient import neutral, neutral_steps
from specvlm.core.byvalue import ByValue
from specvlm.core.clock import Seconds
from specvlm.core.config import DEFAULT_FPS, EngineConfig, SamplingConfig
from specvlm.core.errors import CapacityError, ConfigError
from specvlm.core.upload import upload
from specvlm.engine import effects, pair, sources
from specvlm.engine.account import Decision, Generation, Seen, measure_peak, reset_peak
from specvlm.engine.drafts import LEAST_TOKENS, Drafts
from specvlm.engine.fit import Prompted, fitted
from specvlm.engine.request import Prefilled, Request
from specvlm.engine.text import Chunk, TextStream
from specvlm.families import Inputs, Limits, Prompt, last_words, parse, texts
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import Session
from specvlm.speculate import accept
from specvlm.speculate import drafters as drafting
from specvlm.speculate.memory import Memory


@dataclass(frozen=True, eq=False)
class Round(ByValue):
    """What one target pass added. The first comes from the prefill and drafts nothing."""

    token_ids: tuple[int, ...]  # new tokens of the text, the bonus token last, cut where the text ends
    draft: accept.Draft  # what was proposed; on a GPU the next round overwrites its tensors
    accepted: accept.Accepted  # what of it the target agreed with
    finish_reason: str | None  # on the last round: "stop" (end-of-sequence token) or "length"

    @property
    def num_accepted(self) -> int:
        """Accepted draft tokens that stand in the text."""
        return min(len(self.accepted.nodes), len(self.token_ids))


class SpecVLM:
    """A target, a draft and the settings that hold unless a call changes them.

    Args:
        target: the model whose words come out.
        draft: a smaller model of its family, the target itself, or None (plain decoding).
        config: defaults of every call.

    Raises:
        UnsupportedModel: the two do not fit each other.
    """

    def __init__(self, target: VideoLM, draft: VideoLM | None = None, config: EngineConfig | None = None) -> None:
        self.target = target
        self.draft = draft
        self.config = config or EngineConfig()
        self._memory = Memory()
        if draft is not None:
            pair.check_pair(target, draft)
        target.rules.check()

    @classmethod
    def from_pretrained(
        cls,
        target: str | os.PathLike[str] | None = None,
        *,
        draft: str | os.PathLike[str] | None = None,
        device: str = "auto",
        draft_device: str | None = None,
        draft_quant: str | None = None,
        dtype: str = "auto",
        watch: Callable[[str], None] = lambda text: None,
        **settings: Any,
    ) -> SpecVLM:
        """Load a pair.

        Args:
            target: Hugging Face directory or hub id; None is the bundled pair.
            draft: the same for the draft; equal to `target` shares the weights; "self": the target drafts for itself;
                None beside a target is plain decoding.
            device: "auto", "cpu", "cuda", "cuda:1", ...
            draft_device: the draft's; None is the target's.
            draft_quant: weight-only quantisation of the draft, "fp8", "int8" or "int4"; the text does not depend on it.
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
            watch: progress callback.
            **settings: any field of the configs, as in `EngineConfig.replace`.

        Raises:
            UnsupportedModel: a checkpoint cannot be read or served, or the two do not fit each other.
            ConfigError: a setting is unknown or not allowed.
        """
        planned = pair.plan(
            target,
            draft,
            settings,
            device=device,
            draft_device=draft_device,
            draft_quant=draft_quant,
            dtype=dtype,
        )
        return cls(*planned.load(watch), planned.config)

    def request(self, source: Any, prompt: str | None = None, **settings: Any) -> Request:
        """Prepare a request: messages in the usual chat form, or a video source and a question.

        Args:
            source: a list of messages; or anything that `media.load` reads; or a list of videos, which stand in one
                prompt; or None for a question without a video; or a request, to ask the same with other settings.
            prompt: the question; None asks for a description. Not beside messages.
            **settings: any field of the configs, as in `EngineConfig.replace`.

        Raises:
            ConfigError: a setting is unknown or not allowed.
        """
        config = self._in_force(pair.checked(self.config.replace(**settings)))
        prune.scoring_layers(config.prune, self.target.num_layers)  # refuses a layer that is not there
        if isinstance(source, Request):
            return Request(config, source.messages, source.media, seen=source.seen, loaded=source.loaded)
        messages, found = parse(sources.messages_of(source, prompt))
        self.target.family.check_text(messages)
        for medium in found:
            medium.config(config.video)  # refuses what is not allowed before anything is read
            if medium.source is None:
                raise ConfigError(f"{medium.place} names no {medium.kind}: add {medium.kind!r}, 'path' or 'url'")
        if _looks_up(config) and not any(words.strip() for message in messages for words in texts(message)):
            text = "an empty prompt has no words to look up, so that only the answer's own are: ask a question"
            warnings.warn(f"{text}, or draft with a model", drafting.DraftWarning, stacklevel=3)
        return Request(config, messages, found)

    def _in_force(self, config: EngineConfig) -> EngineConfig:
        """Return the config with every default that depends on the checkpoint or on chance filled in."""
        filled: dict[str, Any] = {}
        if config.sampling.repetition_penalty is None:
            filled["repetition_penalty"] = self.target.rules.repetition_penalty
        if config.sampling.temperature > 0 and config.sampling.seed is None:
            filled["seed"] = secrets.randbits(32)
        if config.video.fps is None and config.video.num_frames is None:
            filled["fps"] = DEFAULT_FPS
        return config.replace(**filled)

    def rounds(self, request: Request) -> Iterator[Round]:
        """Yield one Round a target pass until the text ends: the loop of SpecVLM (arXiv 2508.16201, section 3)."""
        return self.decode(request, self.prefill(request))

    @neutral()
    def prefill(self, request: Request, *, is_scored: bool | None = None) -> Prefilled:
        """Read, encode and prefill a request on the target, which scores the visual tokens on the way.

        Args:
            request: what to prefill.
            is_scored: None scores where the request's pruner reads scores.

        Raises:
            MediaError: a file cannot be used.
            CapacityError: prompt and new tokens exceed the target's context.
        """
        config, target, stage = request.config, self.target, request.seconds.stage
        with stage("read", target.device):
            inputs = self.read(request)
        begin = time.perf_counter()
        with stage("encode", target.device):
            prompt = target.encode(inputs)
        with stage("prefill", target.device):
            if is_scored is None:
                drafts = config.sampling.max_new_tokens >= LEAST_TOKENS
                prunes = drafts and drafting.drafter_class(config.draft, self.draft).prunes
                is_scored = prunes and prune.needs_scores(config.prune)
            first = _first_score_row(prompt, target, config) if is_scored else None
            room = config.sampling.max_new_tokens + tree.MAX_NODES
            layers = prune.scoring_layers(config.prune, target.num_layers)
            session, logits, scores = target.start(
                prompt, room, score_from=first, score_layers=layers, eager=config.run.eager
            )
        return Prefilled(inputs, prompt, session, logits, scores, time.perf_counter() - begin)

    def decode(
        self, request: Request, start: Prefilled, observe: Callable[[Tensor], None] = lambda logits: None
    ) -> Iterator[Round]:
        """Propose, verify, accept, commit until the text ends. The first Round holds the prefill's own token.

        Stop strings end a text, not its tokens: they are the business of `stream`.

        Args:
            request: what was prefilled.
            start: its prefill.
            observe: told the target's logits [N + 1, vocab] of every pass before its Round comes.
        """
        return neutral_steps(self._decode(request, start, observe))

    def _decode(self, request: Request, start: Prefilled, observe: Callable[[Tensor], None]) -> Iterator[Round]:
        sampling, session = request.config.sampling, start.session
        request.usage.prompt_tokens, request.usage.visual_tokens = len(start.prompt), start.prompt.num_visual
        if request.speculation.target_passes:
            raise ConfigError("a Request runs once: make another with request()")
        if not session.is_at_prompt:
            raise ConfigError("this Prefilled was decoded already: call session.rollback() before decode()")
        if session.cache.capacity < session.length + sampling.max_new_tokens + tree.MAX_NODES:
            problem = f"this prefill has no room for max_new_tokens={sampling.max_new_tokens}"
            raise CapacityError(f"{problem}: prefill again with that setting")
        ids = start.prompt.input_ids
        processors = self.target.rules.processors(ids, sampling)
        verifier = accept.Verifier(sampling, accept.seen_in(ids, self.target.vocab_size), processors)
        ending = _Ending(sampling, self.target.eos_ids)

        draft = accept.Draft.empty(self.target.device)
        observe(start.logits[None])
        latest = ending.cut(draft, verifier.accept(start.logits[None], draft))
        request.speculation.add(0, 0)
        request.seconds.first_token()
        drafts = Drafts(self.target, self.draft, self._memory, request, start)
        run = _Run(request, session, drafts, verifier, ending, observe)
        try:
            yield latest
            while latest.finish_reason is None:
                latest = self._round(run, latest.token_ids[-1])
                yield latest
        finally:  # the text may also end by a stop string
            drafts.finish(sampling.max_new_tokens - ending.left, is_cut=latest.finish_reason == "length")

    def _round(self, run: _Run, token: int) -> Round:
        """Propose behind the newest token, verify, accept, commit."""
        request, session, drafts = run.request, run.session, run.drafts
        stage, device = request.seconds.stage, self.target.device
        once, begin = _once(request.seconds), time.perf_counter()
        with stage("decode"):
            choice = drafts.choose(token, run.ending.left - 1)
            draft = drafts.propose(choice)
            if not session.is_ready(len(draft) + 1):
                with stage("capture", device):
                    session.capture(len(draft) + 1)
            tokens = torch.cat([upload([token], device), draft.tokens.clamp_min(0)])  # empty places run, too
            logits = session.verify(tokens, draft.rows, drafts.score_collector())
            drafts.foresee()
            run.observe(logits)
            accepted = run.verifier.accept(logits, draft)
            session.keep((0, *(node + 1 for node in accepted.nodes)))
            observations = drafts.commit(accepted)
        is_usual = _once(request.seconds) == once and bool(len(draft)) == bool(len(choice.topology))
        ms = 1e3 * (time.perf_counter() - begin) if is_usual else None
        drafts.learn(choice, observations, len(accepted.token_ids), ms)
        latest = run.ending.cut(draft, accepted)
        request.speculation.add(len(draft), latest.num_accepted)
        request.decisions.append(Decision(choice, len(draft), len(latest.token_ids)))
        return latest

    def stream(self, source: Any, prompt: str | None = None, **settings: Any) -> Iterator[Chunk]:
        """Yield the text as it is verified; the last chunk carries finish_reason.

        Arguments are those of `request`.

        Raises:
            SpecVLMError: a setting, a file or a model is at fault; the message names it and the remedy.
        """
        return self.stream_request(self._told(self.request(source, prompt, **settings), settings))

    def stream_request(self, request: Request, start: Prefilled | None = None) -> Iterator[Chunk]:
        """Yield the text of a request, which holds the account of the run afterwards.

        Args:
            request: what to answer.
            start: its prefill, where there is one already.
        """
        if request.speculation.target_passes:
            raise ConfigError("a Request runs once: make another with request()")
        request.seconds.start()
        text = TextStream(self.target.tokenizer, self.target.eos_ids, request.config.sampling.stop)
        for latest in self.rounds(request) if start is None else self.decode(request, start):
            chunk = text.add(latest.token_ids, latest.finish_reason)
            request.usage.completion_tokens += len(chunk.token_ids)
            request.speculation.cut(latest.num_accepted, min(latest.num_accepted, len(chunk.token_ids)))
            request.seconds.finish()
            yield chunk
            if chunk.finish_reason is not None:
                return

    def generate(self, source: Any, prompt: str | None = None, **settings: Any) -> Generation:
        """Return the whole answer with its account. Arguments and errors are those of `stream`."""
        return self.generate_request(self._told(self.request(source, prompt, **settings), settings))

    def _told(self, request: Request, given: Collection[str]) -> Request:
        """Warn of settings of the call that belong to another drafter."""
        mistaken = [name for name in given if name in ("refresh", "lookup_tokens")]
        for problem in self.without_effect(mistaken, request.config):
            warnings.warn(problem, effects.SettingWarning, stacklevel=3)
        return request

    def without_effect(
        self, given: Collection[str], config: EngineConfig | None = None, *, is_drawn: bool = False
    ) -> list[str]:
        """Return a line for each setting that was given, by name, and is not read beside the others.

        Args:
            given: the names.
            config: what is in force; None is the model's own.
            is_drawn: whether what the pruner keeps is drawn, whoever drafts.
        """
        config = config or self.config
        found = drafting.drafter_class(config.draft, self.draft)
        drafter = "none" if found is drafting.DRAFTERS["none"] else config.draft.drafter
        return effects.without_effect(config, given, drafter, prunes=is_drawn or found.prunes)

    def generate_request(
        self,
        request: Request,
        on_chunk: Callable[[Chunk], None] | None = None,
        start: Prefilled | None = None,
    ) -> Generation:
        """Run a request to its end and return the answer with its account; `on_chunk` sees each chunk as it comes.

        Given its prefill as `start`, the account begins behind it.
        """
        reset_peak(*self.devices)
        chunks = []
        for chunk in self.stream_request(request, start):
            chunks.append(chunk)
            if on_chunk is not None:
                on_chunk(chunk)
        return Generation(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=str(chunks[-1].finish_reason),
            usage=request.usage,
            speculation=request.speculation,
            seconds=request.seconds,
            peak_memory_bytes=measure_peak(*self.devices),
            config=request.config,
            models=self.models,
            prompt=last_words(request.messages),
            seen=request.seen,
            decisions=tuple(request.decisions),
        )

    @property
    def devices(self) -> set[torch.device]:
        """The devices of target and draft."""
        return {self.target.device, (self.draft or self.target).device}

    @property
    def models(self) -> dict[str, str | None]:
        """What is loaded and where."""
        draft = self.draft
        return {
            "target": self.target.name,
            "draft": draft.name if draft else None,
            "device": str(self.target.device),
            "draft_device": str(draft.device) if draft else None,
            "draft_quant": draft.quant if draft else None,
            "dtype": str(self.target.dtype).removeprefix("torch."),
        }

    @neutral()
    def read(self, request: Request) -> Inputs:
        """Read the media of a request and return the target's inputs.

        Raises:
            MediaError: a file cannot be used.
            CapacityError: prompt and new tokens exceed the target's context.
        """
        target, prompted = self.target, self._prompted(request)
        inputs = target.family.inputs(prompted.messages, prompted.media, limits=prompted.limits, device=target.device)
        return replace(inputs, text_positions=request.config.video.text_positions)

    @neutral()
    def load(self, source: Any, prompt: str | None = None, **settings: Any) -> Request:
        """Prepare a request and read its media, once for all requests that are made from it. Arguments: see `request`.

        Raises:
            MediaError: a file cannot be used.
            CapacityError: prompt and new tokens exceed the target's context.
        """
        request = self.request(source, prompt, **settings)
        request.loaded = self._prompted(request)
        return request

    def _prompted(self, request: Request) -> Prompted:
        """Return a request's messages and media; videos that exceed the target's context are thinned, or refused."""
        if request.loaded is not None:
            return request.loaded
        config, target = request.config, self.target
        configs = [medium.config(config.video) for medium in request.media]
        found = [
            media.load(medium.source, own, kind=medium.kind) for medium, own in zip(request.media, configs, strict=True)
        ]
        prompted = Prompted(request.messages, found, [Limits.of(own) for own in configs])
        num_new = config.sampling.max_new_tokens
        prompted = fitted(target.family, prompted, num_new, target.context_len, config.video)
        request.seen = tuple(
            Seen(medium.kind, sources.name_of(medium.source), tuple(frames.seconds.tolist()))
            for medium, frames in zip(request.media, prompted.media, strict=True)
        )
        return prompted


class _Ending:
    """Where the text ends: after an end-of-sequence token or after exactly max_new_tokens."""

    def __init__(self, sampling: SamplingConfig, eos_ids: frozenset[int]) -> None:
        self.left = sampling.max_new_tokens  # tokens that may still come
        self._eos_ids = frozenset() if sampling.ignore_eos else eos_ids

    def cut(self, draft: accept.Draft, accepted: accept.Accepted) -> Round:
        """Return the round with its tokens cut where the text ends."""
        tokens = accepted.token_ids[: self.left]
        ends = next((place for place, token in enumerate(tokens) if token in self._eos_ids), None)
        if ends is not None:
            tokens = tokens[: ends + 1]
        self.left -= len(tokens)
        reason = "stop" if ends is not None else "length" if self.left == 0 else None
        return Round(tokens, draft, accepted, reason)


@dataclass(frozen=True)
class _Run:
    """What the rounds of one request work with."""

    request: Request
    session: Session
    drafts: Drafts
    verifier: accept.Verifier
    ending: _Ending
    observe: Callable[[Tensor], None]  # told the logits of every pass


def _once(seconds: Seconds) -> float:
    """Return the seconds so far of what no usual round holds: starting to draft, and making graphs."""
    return seconds["capture"] + seconds["draft_prefill"]


def _looks_up(config: EngineConfig) -> bool:
    return config.draft.drafter == "lookup" or config.draft.lookup_tokens > 0


def _first_score_row(prompt: Prompt, target: VideoLM, config: EngineConfig) -> int | None:
    """Return the first text row whose attention scores the visual tokens, behind the last of them."""
    if not prompt.num_visual:
        return None
    first = int(prompt.visual_index[-1]) + 1
    if config.prune.score_rows == "last_turn":
        first = max(first, target.family.last_turn(prompt.input_ids))
    if config.prune.score_rows == "last":
        first = max(first, len(prompt) - 1)
    return first
