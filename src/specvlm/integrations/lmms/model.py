"""A pair as a model of lmms-eval: a task's messages and generation_kwargs become requests; text and account go back.

Tasks of any media but audio are served, one request at a time: generate_until, generate_until_multi_round and, through
the first, generate_until_agentic.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import calculate_token_throughput, log_metrics
from lmms_eval.models.model_utils.progress import make_progress
from loguru import logger

from specvlm.cli.options import MODEL_OPTIONS
from specvlm.core.config import EngineConfig
from specvlm.core.errors import CapacityError, ConfigError, MediaError, memory_errors
from specvlm.engine.account import Generation, Speculation
from specvlm.engine.api import SpecVLM
from specvlm.families import Message

_SETTINGS = frozenset(setting.name for part in vars(EngineConfig()).values() for setting in fields(part))
_INJECTED = ("\n\n",)  # what lmms-eval fills in as `until` where a task names none; answers have paragraphs

Ask = Callable[[Sequence[Message]], GenerationResult]


class LmmsModel(lmms):  # type: ignore[misc]
    """What `--model specvlm` runs.

    Args:
        target: as for `SpecVLM.from_pretrained`, like the next five; no target is the bundled pair.
        draft: the draft.
        device: "auto" and "cuda" give each process of `accelerate launch` its own GPU.
        draft_device: the draft's.
        draft_quant: weight-only quantisation of the draft.
        dtype: of the weights.
        batch_size: 1.
        max_batch_size: an upper bound of batch_size.
        **settings: any field of the configs. They hold where a task's generation_kwargs say nothing else.

    Raises:
        ConfigError: an argument is unknown (the known ones are listed) or a value is not allowed.
        UnsupportedModel: a checkpoint cannot be read or served, or the two do not fit each other.
    """

    is_simple = False  # tasks hand over messages

    def __init__(
        self,
        target: str | None = None,
        draft: str | None = None,
        device: str = "auto",
        draft_device: str | None = None,
        draft_quant: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            allowed = "requests are answered one at a time, so leave it out or give 1"
            raise ConfigError(f"batch_size={batch_size!r} is not allowed: {allowed}")
        if unknown := sorted(settings.keys() - _SETTINGS):
            known = ", ".join((*MODEL_OPTIONS, *sorted(_SETTINGS)))
            raise ConfigError(f"unknown model_args {unknown[0]!r}: known are {known}")
        self._model = SpecVLM.from_pretrained(
            target,
            draft=draft,
            device=_own_device(device),
            draft_device=draft_device,
            draft_quant=draft_quant,
            dtype=dtype,
            watch=logger.info,
            **{name: _parsed(name, value) for name, value in settings.items()},
        )
        self.device = self._model.target.device  # where lmms-eval gathers the ranks' counts
        self._told: set[str] = set()  # generation_kwargs of which it was said that they are left out

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return each request's answer, in their order."""
        return self._each(requests, lambda ask, messages_of, doc: ask(messages_of(doc)))

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Return each request's answers, one a round, in their order."""
        return self._each(requests, _rounds)

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: there is nothing to draft where nothing is generated."""
        raise NotImplementedError(
            "specvlm serves tasks of output_type generate_until, generate_until_multi_round or generate_until_agentic, "
            "not loglikelihood or multiple_choice: choose a task that generates"
        )

    def clean(self) -> None:
        """Free the models, as for a judge that lmms-eval runs next."""
        del self._model
        super().clean()

    def _each(self, requests: Sequence[Instance], converse: Callable[[Ask, Callable[..., Any], Any], Any]) -> list[Any]:
        """Return what `converse` makes of each request, and log the account of all."""
        account, results = _Account(), []
        with make_progress(len(requests), "Model Responding", disable=self.rank != 0) as progress:
            for request in requests:
                _, messages_of, generation_kwargs, doc_id, task, split = request.args
                ask = partial(self._ask, f"{task}, document {doc_id}", self._settings(generation_kwargs), account)
                results.append(converse(ask, messages_of, self.task_dict[task][split][doc_id]))
                progress.update(1)
        account.log()
        return results

    def _ask(
        self, name: str, settings: Mapping[str, Any], account: _Account, messages: Sequence[Message]
    ) -> GenerationResult:
        """Return the answer; an empty one, which is counted and logged, where a file or its length is at fault."""
        begin = time.perf_counter()
        try:
            with memory_errors():
                answer = self._model.generate([_with_parts(message) for message in messages], **settings)
        except (MediaError, CapacityError) as error:
            logger.error(f"{name} gets an empty answer: {error}")
            account.failed_requests += 1
            return GenerationResult("")
        account.add(answer, time.perf_counter() - begin)
        usage = answer.usage
        counts = TokenCounts(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)
        return GenerationResult(answer.text, counts)

    def _settings(self, generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return generation_kwargs as settings; of those that are none it is said once that they are left out."""
        settings = to_settings(generation_kwargs)
        for name in sorted(settings.keys() - _SETTINGS - self._told):
            logger.warning(f"generation_kwargs {name}={settings[name]!r} has no meaning here and is left out")
            self._told.add(name)
        return {name: value for name, value in settings.items() if name in _SETTINGS}


def to_settings(generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's generation_kwargs under the names that settings have here; unknown ones stay as they are.

    Raises:
        ConfigError: beam search is asked for.
    """
    settings = {name: value for name, value in generation_kwargs.items() if value is not None}
    if (num_beams := settings.pop("num_beams", 1)) != 1:
        raise ConfigError(
            f"num_beams={num_beams!r} is not allowed: there is no beam search, so set --gen_kwargs num_beams=1"
        )
    until = _texts(settings.pop("until", ()))
    if until and until != _INJECTED:
        settings["stop"] = until
    do_sample = settings.pop("do_sample", None)
    if do_sample:
        settings.setdefault("temperature", 1.0)
    elif do_sample is not None:
        settings["temperature"] = 0.0
    if settings.get("temperature") == 0:  # tasks add values to it that only sampling would refuse, such as top_p: 0
        settings = {name: value for name, value in settings.items() if name not in ("top_p", "top_k", "min_p")}
    return settings


@dataclass
class _Account:
    """Sums over the answers of a run."""

    requests: int = 0  # answered ones; a round of several counts by itself
    failed_requests: int = 0
    tokens: int = 0
    seconds: float = 0.0  # from messages to text
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    speculation: Speculation = field(default_factory=Speculation)

    def add(self, answer: Generation, seconds: float) -> None:
        """Count an answer that took so long."""
        self.requests += 1
        self.tokens += answer.usage.completion_tokens
        self.seconds += seconds
        self.time_to_first_token += answer.seconds.time_to_first_token
        self.decode_seconds += answer.seconds["decode"]
        self.speculation.rounds += answer.speculation.rounds
        self.speculation.target_passes += answer.speculation.target_passes
        self.speculation.drafted_tokens += answer.speculation.drafted_tokens
        self.speculation.accepted_tokens += answer.speculation.accepted_tokens

    def log(self) -> None:
        """Hand the sums and means to lmms-eval, which logs them on a line and writes those of rank 0 to its results."""
        speculation = self.speculation
        log_metrics(
            total_elapsed_time=self.seconds,
            total_gen_tokens=self.tokens,
            avg_speed=calculate_token_throughput(self.tokens, self.seconds),
            additional_metrics={
                "total_requests": self.requests,
                "failed_requests": self.failed_requests,
                "time_to_first_token": self.time_to_first_token / max(1, self.requests),
                "decode_seconds": self.decode_seconds,
                "target_passes": speculation.target_passes,
                "drafted_tokens": speculation.drafted_tokens,
                "accepted_tokens": speculation.accepted_tokens,
                "mean_accepted_length": speculation.mean_accepted_length,
                "acceptance_length": speculation.acceptance_length,
            },
        )


def _rounds(ask: Ask, messages_of: Callable[..., Any], doc: Any) -> list[str]:
    """Return the answers of all rounds; the task makes each round's messages of the answers before, or ends."""
    answers, info, number = [ask(messages_of(doc)).text], None, 1
    while True:
        following = messages_of(doc, round_idx=number, previous_output=answers, previous_round_info=info)
        messages, is_over, answers, info = following
        if is_over:
            return [answer or "" for answer in answers]  # a task marks a round that it skips by None
        answers = [*answers, ask(messages).text]
        number += 1


def _with_parts(message: Message) -> Message:
    """Return a message whose parts name beginning and end of a video as everywhere else."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": [_part(part) for part in content]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if isinstance(part.get("url"), dict):  # {"path": ..., "video_start": ..., "video_end": ...}
        part = {key: value for key, value in part.items() if key != "url"} | part["url"]
    times = {f"{name}_time": f"video_{name}" for name in ("start", "end")}
    return {times.get(key, key): value for key, value in part.items()}


def _parsed(name: str, value: Any) -> Any:
    """Return a value of model_args as its field takes it.

    lmms-eval makes numbers and booleans of what looks like them, splits at commas outside of quotes and brackets, and
    leaves these in place: a list, or text with a comma in quotes, arrives as JSON.
    """
    if isinstance(value, str) and value.startswith(("[", '"')):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name}={value} is not allowed: give a list or quoted text as JSON ({error})") from error
    return _texts(value) if name == "stop" else value


def _texts(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _own_device(device: str) -> str:
    """Return this process's device: of several that accelerate or torchrun started, each takes a GPU of its own."""
    is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_one_of_several and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device
