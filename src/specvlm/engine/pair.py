"""Loading a target and its draft, which fit each other or are refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from specvlm import prune
from specvlm.core.config import EngineConfig, shown
from specvlm.core.errors import ConfigError, UnsupportedModel
from specvlm.runtime.model import VideoLM, check_quant, resolve_device
from specvlm.speculate import drafters as drafting

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Plan:
    """Which two models are loaded, and where. `check` refuses what does not go together before anything is read."""

    target: Source
    draft: Source | None  # "self": the target drafts for itself; None: plain decoding
    config: EngineConfig
    device: str
    draft_device: str | None  # None is the target's
    draft_quant: str | None
    dtype: str

    @property
    def is_shared(self) -> bool:
        """Whether the draft is the target's own weights."""
        if self.draft is None or self.draft == "self":
            return self.draft is not None
        is_same = os.fspath(self.draft) == os.fspath(self.target)
        return is_same and resolve_device(self._where_to_draft) == resolve_device(self.device)

    @property
    def _where_to_draft(self) -> str:
        return self.draft_device or self.device

    def check(self) -> None:
        """Refuse settings of a draft that is not there or cannot have them.

        Raises:
            ConfigError: the setting and what to do instead.
        """
        for name, value in (("draft_device", self.draft_device), ("draft_quant", self.draft_quant)):
            if value is not None and self.draft is None:
                raise ConfigError(f"{name}={value!r} is not allowed without a draft: name one")
        if self.draft_device is not None and self.draft == "self":
            raise ConfigError(f"draft_device={self.draft_device!r} is not allowed for self-drafting: leave it out")
        if self.draft_quant is not None:
            self._check_quant(self.draft_quant)

    def _check_quant(self, quant: str) -> None:
        if self.config.draft.drafter == "self" and not self.is_shared:  # it would be quantised and never asked
            problem = f"draft_quant={quant!r} is not allowed for self-drafting beside another draft"
            raise ConfigError(f"{problem}: leave draft={str(self.draft)!r} out")
        check_quant(quant, resolve_device(self._where_to_draft))

    def load(self, watch: Callable[[str], None]) -> tuple[VideoLM, VideoLM | None]:
        """Load both. `watch` is the progress callback."""
        is_shared = self.is_shared  # an unknown device is refused before anything is loaded
        target = VideoLM.from_pretrained(self.target, device=self.device, dtype=self.dtype, watch=watch)
        if self.draft is None:
            return target, None
        draft = target
        if not is_shared:
            draft = VideoLM.from_pretrained(self.draft, device=self._where_to_draft, dtype=self.dtype, watch=watch)
        if self.draft_quant is not None:
            watch(f"quantising {draft.name} to {self.draft_quant}...")
            draft = draft.quantised(self.draft_quant, keep_original=is_shared)
        return target, draft


def plan(
    target: Source | None,
    draft: Source | None,
    settings: Mapping[str, Any],
    *,
    device: str,
    draft_device: str | None,
    draft_quant: str | None,
    dtype: str,
) -> Plan:
    """Return what `SpecVLM.from_pretrained` shall load; its arguments are explained there.

    Raises:
        ConfigError: a setting is unknown or not allowed.
    """
    for name, value in (("target", target), ("draft", draft)):
        if not isinstance(value, str | os.PathLike | None):
            raise ConfigError(f"{name}={shown(value)} is not allowed: give a Hugging Face directory or hub id")
    if draft == "self":
        settings = {"drafter": "self", **settings}
    config = checked(EngineConfig().replace(**settings))
    drafter = config.draft.drafter
    if target is None:
        target = bundled("target")
        draft = draft or (bundled("draft") if drafting.DRAFTERS[drafter].needs_model else None)
    if drafter == "self":
        draft = draft or "self"
    planned = Plan(target, draft, config, device, draft_device, draft_quant, dtype)
    planned.check()
    return planned


def checked(config: EngineConfig) -> EngineConfig:
    """Return the config if its drafter, tree and pruner exist, before a model is loaded or a video read.

    Raises:
        ConfigError: the setting and what is allowed.
    """
    drafting.check(config.draft)
    prune.get(config.prune.pruner)
    if config.draft.drafter == "self" and config.prune.positions == "repacked":
        problem = "positions='repacked' is not allowed for self-drafting, which takes the target's own keys"
        raise ConfigError(f"{problem}: leave it out, or draft with a model")
    return config


def bundled(name: str) -> str:
    """Return the directory of the bundled "target", "draft" or "clips"."""
    return str(files("specvlm") / "bundled" / name)


def check_pair(target: VideoLM, draft: VideoLM) -> None:
    """Refuse a draft that cannot propose for the target.

    Padding of the vocabulary may differ: token ids are compared, not sizes.

    Raises:
        UnsupportedModel: a family of another group or another tokenizer; the first differing entry is named.
    """
    if draft.hf is target.hf:
        return
    if draft.family.group != target.family.group:
        raise UnsupportedModel(
            f"draft {draft.name} is a {draft.model_type}, target {target.name} a {target.model_type}: "
            "choose a draft of the target's family"
        )
    words = {index: token for token, index in target.tokenizer.get_vocab().items()}
    others = {index: token for token, index in draft.tokenizer.get_vocab().items()}
    if words != others:
        first = min(index for index in words.keys() | others.keys() if words.get(index) != others.get(index))
        raise UnsupportedModel(
            f"the tokenizers of target and draft differ: token {first} is {words.get(first)!r} in {target.name} "
            f"and {others.get(first)!r} in {draft.name}"
        )
    ours, theirs = _flat(target.family.settings), _flat(draft.family.settings)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UnsupportedModel(
                f"target and draft see a video differently: {key} is {ours.get(key)} in {target.name} "
                f"and {theirs.get(key)} in {draft.name}; choose a draft with the target's processor"
            )


# What a draft may have otherwise: it reads the pixels and ids that the target's settings made.
_FREE_SETTINGS = frozenset(
    ("size", "min_pixels", "max_pixels", "cap_pixels_per_frame", "max_video_tokens", "resample", "chat_template")
)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, without those that a draft may have otherwise."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in _FREE_SETTINGS:
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
