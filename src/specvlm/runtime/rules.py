"""What a checkpoint's generation_config.json asks of decoding: each entry is obeyed, ours to set, without effect, or
warned about by name.

What changes logits is left to transformers: its own processors, in the order of its generate(). Those that look at the
text see, for each row of a tree, prompt, text and the path to that row, as if it were decoded alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, WatermarkingConfig

from specvlm.core.config import PENALTIES, SamplingConfig
from specvlm.core.errors import SpecVLMWarning, UnsupportedModel
from specvlm.core.upload import upload

OBEYED = frozenset(
    ("bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
     "eos_token_id", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id",
     "forced_eos_token_id", "min_length", "min_new_tokens", "no_repeat_ngram_size", "remove_invalid_values",
     "renormalize_logits", "repetition_penalty", "sequence_bias", "suppress_tokens", "top_h", "typical_p",
     "watermarking_config")
)  # fmt: skip
# Settings of ours decide, and their defaults are greedy: nearly every checkpoint has these, so no warning.
OURS = frozenset(("do_sample", "temperature", "top_k", "top_p", "min_p"))
# How generate() computes or what it returns, the ids of a batch's padding, and what only beams or an assistant read.
WITHOUT_EFFECT = frozenset(
    ("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "bos_token_id", "cache_config",
     "cache_implementation", "compile_config", "continuous_batching_config", "decoder_start_token_id",
     "disable_compile", "early_stopping", "is_assistant", "length_penalty", "low_memory", "max_cache_len",
     "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions",
     "output_hidden_states", "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size",
     "prompt_lookup_num_tokens", "return_dict_in_generate", "speculation_type", "target_lookbehind",
     "transformers_version", "use_cache", "use_mtp")
)  # fmt: skip
_ONE_TEXT = "one text is decoded, greedily or sampled"
_OTHER_METHOD = "this way of decoding is not served"
NOT_OBEYED: Mapping[str, str] = {  # and what to do instead
    "assistant_ensemble_weight": "drafts never change the text",
    "constraints": _OTHER_METHOD,
    "diversity_penalty": _ONE_TEXT,
    "dola_layers": _OTHER_METHOD,
    "force_words_ids": _OTHER_METHOD,
    "guidance_scale": "classifier-free guidance is not served",
    "max_length": "set max_new_tokens",
    "max_new_tokens": "set max_new_tokens",
    "max_time": "set max_new_tokens",
    "num_beam_groups": _ONE_TEXT,
    "num_beams": _ONE_TEXT,
    "num_return_sequences": _ONE_TEXT,
    "penalty_alpha": _OTHER_METHOD,
    "stop_strings": "set stop",
    "token_healing": "the prompt is taken as it is",
}
_DEFAULTS: dict[str, Any] = GenerationConfig._get_default_generation_params()
_NEUTRAL = {"guidance_scale": 1, "penalty_alpha": 0}  # beside those, None and False
_NO_LAW = SamplingConfig(repetition_penalty=1.0)


class RulesWarning(SpecVLMWarning):
    """An entry of a checkpoint's generation_config.json is not obeyed."""


class Processors:
    """transformers' logits processors over the rows of one request's trees. It waits for the device twice a round.

    Args:
        processors: in the order of generate().
        prompt_ids: [S] int64.
    """

    def __init__(self, processors: LogitsProcessorList, prompt_ids: Tensor) -> None:
        self._processors = processors
        self._known = prompt_ids[None]

    def __call__(self, logits: Tensor, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Return the scores [N + 1, vocab] that generate() would choose by after each row.

        Args:
            logits: [N + 1, vocab] float32, of the root and the nodes.
            tokens: N drafted tokens; -1 is a place left empty.
            parents: N parents, -1 for children of the root; a parent stands before its children.
        """
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(tokens, parents, strict=True):
            paths.append((*paths[parent + 1], max(token, 0)))
        rows = [torch.cat([self._known, upload(path, logits.device)[None]], 1) for path in paths]
        # one by one: some processors know of one text only
        scores = [self._processors(ids, row[None]) for ids, row in zip(rows, logits, strict=True)]  # type: ignore[arg-type]
        return torch.cat(scores)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Make tokens part of the known text."""
        self._known = torch.cat([self._known, upload(token_ids, self._known.device)[None]], 1)


class Rules:
    """The entries of one checkpoint.

    Args:
        hf: the Hugging Face model, whose `generation_config` is read.
        name: of the checkpoint, for messages.
        eos_ids: what ends a text.
        vocab_size: of the logits.
    """

    def __init__(self, hf: Any, name: str, eos_ids: Collection[int], vocab_size: int) -> None:
        self._hf = hf
        self._name = name
        self._eos_ids = sorted(eos_ids)
        self._vocab_size = vocab_size
        entries = {key: value for key, value in vars(hf.generation_config).items() if not key.startswith("_")}
        self._entries = {key: value for key, value in entries.items() if not _is_neutral(key, value)}

    @property
    def not_obeyed(self) -> dict[str, Any]:
        """The entries that would change generate()'s text and are not obeyed."""
        known = OBEYED | OURS | WITHOUT_EFFECT
        found = {key: value for key, value in self._entries.items() if key not in known}
        watermark = self._entries.get("watermarking_config")
        if watermark is not None and not isinstance(watermark, WatermarkingConfig):
            found["watermarking_config"] = watermark  # SynthID's remembers the texts that it was asked about
        return found

    @property
    def repetition_penalty(self) -> float:
        """What generate() would apply.

        Raises:
            UnsupportedModel: the entry is no penalty.
        """
        penalty = self._entries.get("repetition_penalty", 1.0)
        least, most = PENALTIES
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not least <= penalty <= most:
            raise self._problem(f"repetition_penalty={penalty!r} is not allowed: from {least:g} to {most:g}")
        return float(penalty)

    def check(self) -> None:
        """Try every entry, and warn about those that are not obeyed.

        Raises:
            UnsupportedModel: transformers cannot make or run a processor of what an entry says.
        """
        for key, value in sorted(self.not_obeyed.items()):
            remedy = NOT_OBEYED.get(key, "no such entry is known")
            shown = getattr(value, "to_dict", lambda value=value: value)()
            text = f"{self._name}: {key}={shown!r} of generation_config.json is not obeyed: {remedy}"
            warnings.warn(text, RulesWarning, stacklevel=4)
        _ = self.repetition_penalty
        logits = torch.zeros(1, self._vocab_size)
        for temperature in (0.0, 1.0):
            sampling = SamplingConfig(temperature=temperature, repetition_penalty=1.0)
            try:
                found = self.processors(torch.zeros(2, dtype=torch.int64), sampling)
                _ = None if found is None else found(logits, (), ())
                _ = self.bias
            except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
                said = ", ".join(f"{key}={self._entries[key]!r}" for key in sorted(self._on_logits))
                raise self._problem(f"{said} cannot be obeyed ({error})") from error

    def _problem(self, text: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._name}: {text}; mend its generation_config.json")

    @torch.inference_mode()
    def processors(self, prompt_ids: Tensor, sampling: SamplingConfig) -> Processors | None:
        """Return what stands between logits and choice, sampling's filters included; None where only ours do.

        Args:
            prompt_ids: [S] int64, on the device of the logits.
            sampling: with the repetition penalty that is in force.
        """
        neutral = SamplingConfig(temperature=float(sampling.temperature > 0), repetition_penalty=1.0)
        if not self._on_logits or not self._list(self._on_logits, prompt_ids, neutral):
            return None
        return Processors(self._list(self._on_logits, prompt_ids, sampling), prompt_ids)

    @property
    def _on_logits(self) -> dict[str, Any]:
        """The obeyed entries that change logits, but for the repetition penalty, which is a setting of ours, too."""
        keys = OBEYED - {"eos_token_id", "repetition_penalty"} - self.not_obeyed.keys()
        return {key: value for key, value in self._entries.items() if key in keys}

    @cached_property
    def bias(self) -> Tensor | None:
        """What entries about single tokens add to all logits, [vocab] float32 on the CPU; None where there are none.

        A draft follows these; of the others it knows nothing, which costs accepted tokens alone.
        """
        entries = {key: self._on_logits.get(key) or () for key in ("bad_words_ids", "sequence_bias", "suppress_tokens")}
        for key, items in entries.items():
            if key != "suppress_tokens":
                entries[key] = [item for item in items if len(item if key == "bad_words_ids" else item[0]) == 1]
        entries = {key: items for key, items in entries.items() if items}
        if not entries:
            return None
        processors = self._list(entries, torch.zeros(2, dtype=torch.int64), _NO_LAW)
        return Processors(processors, torch.zeros(2, dtype=torch.int64))(torch.zeros(1, self._vocab_size), (), ())[0]

    def _list(self, entries: Mapping[str, Any], prompt_ids: Tensor, sampling: SamplingConfig) -> LogitsProcessorList:
        """Return transformers' own list for these entries and this prompt."""
        config = GenerationConfig()  # type: ignore[no-untyped-call]
        for key, value in entries.items():
            setattr(config, key, copy.deepcopy(value))
        config.eos_token_id = self._eos_ids or None
        if not self._eos_ids:
            config.exponential_decay_length_penalty = None
        config.do_sample = sampling.temperature > 0
        config.temperature = sampling.temperature
        config.top_k = sampling.top_k
        config.top_p = sampling.top_p
        config.min_p = sampling.min_p or None
        config.repetition_penalty = sampling.penalty
        config.max_length = len(prompt_ids) + sampling.max_new_tokens
        self._hf._prepare_special_tokens(config, device=prompt_ids.device)
        found: LogitsProcessorList = self._hf._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=prompt_ids[None],
            device=prompt_ids.device,
            model_kwargs={},
        )
        return found

    @property
    def overrides(self) -> dict[str, Any]:
        """Options of generate() that take out of it what is not obeyed, so that both decode by the same rules."""
        ids = {"bos_token_id", "decoder_start_token_id", "pad_token_id", "transformers_version"}
        keys = (NOT_OBEYED.keys() | WITHOUT_EFFECT) - ids | (self.not_obeyed.keys() & OBEYED)
        return {key: _DEFAULTS.get(key) for key in self._entries if key in keys and key != "max_new_tokens"}


def _is_neutral(key: str, value: object) -> bool:
    """Whether an entry asks for nothing."""
    if key not in OBEYED | OURS | WITHOUT_EFFECT | NOT_OBEYED.keys():
        return value is None
    return value is None or value is False or value == [] or value in (_DEFAULTS.get(key), _NEUTRAL.get(key))
