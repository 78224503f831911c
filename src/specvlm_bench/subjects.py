"""The pairs that are measured: planted ones, or real checkpoints. Nothing is loaded before `load` is called.

A target stays for all measurements; drafts are built one after another, since not all fit beside it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoConfig

from specvlm.runtime.model import VideoLM
from specvlm_bench import planted, published
from specvlm_bench.planted import Cycle
from specvlm_bench.published import Spec
from specvlm_bench.sweep import Layers


@dataclass(frozen=True)
class Subject:
    """A loaded target, and how its drafts are made."""

    name: str
    target: VideoLM
    draft: Callable[[Layers], VideoLM]  # builds it; whoever drops it frees its memory
    replanted: Callable[[VideoLM, str], VideoLM] | None = None  # a draft that knows something else; planted pairs alone
    cycle: Cycle | None = None  # what the text should follow, None for real checkpoints


class Source(Protocol):
    """Where a pair comes from."""

    @property
    def name(self) -> str:
        """What it is called in the results."""
        ...

    def config(self) -> Any:
        """Return the target's Hugging Face config."""
        ...

    def load(self, device: torch.device, dtype: torch.dtype) -> Subject:
        """Load the target onto the device."""
        ...


@dataclass(frozen=True)
class PlantedSource:
    """A planted pair."""

    name: str
    target: Spec
    draft: Spec
    seed: int = 0

    @staticmethod
    def of(name: str, *, is_tiny: bool, seed: int) -> PlantedSource:
        """Return the pair of a name such as "qwen2.5-vl-32b/7b".

        Raises:
            ConfigError: it is malformed or unknown.
        """
        return PlantedSource(f"{name} (tiny)" if is_tiny else name, *published.pair(name, is_tiny=is_tiny), seed)

    def config(self) -> Any:
        """Return the target's Hugging Face config."""
        return AutoConfig.for_model(self.target.model_type, **self.target.config())

    def load(self, device: torch.device, dtype: torch.dtype) -> Subject:
        """Build and plant the target on the device.

        Its drafts are "published" models and "self" copies; a smaller model's can be replanted.
        """
        cycle = Cycle.of(self.target, self.seed)
        common: dict[str, Any] = {"cycle": cycle, "device": device, "dtype": dtype, "seed": self.seed}
        target = planted.build(self.target, **common)

        def draft(layers: Layers) -> VideoLM:
            if layers.drafter == "model":
                return _quantised(planted.build(self.draft, draft="published", **common), layers.quant)
            return replanted(target if layers.quant is None else target.quantised(layers.quant), "self")

        def replanted(model: VideoLM, name: str) -> VideoLM:
            return planted.replanted(model, name, cycle=cycle, seed=self.seed)

        return Subject(self.name, target, draft, replanted, cycle)


@dataclass(frozen=True)
class CheckpointSource:
    """Two Hugging Face directories or hub ids."""

    target: str
    draft: str

    @property
    def name(self) -> str:
        """What the pair is called in the results."""
        return f"{self.target} / {self.draft}"

    def config(self) -> Any:
        """Return the target's Hugging Face config."""
        return AutoConfig.from_pretrained(self.target)

    def load(self, device: torch.device, dtype: torch.dtype) -> Subject:
        """Load the target onto the device."""
        common: dict[str, Any] = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
        target = VideoLM.from_pretrained(self.target, **common)

        def draft(layers: Layers) -> VideoLM:
            if layers.drafter == "model":
                return _quantised(VideoLM.from_pretrained(self.draft, **common), layers.quant)
            return target if layers.quant is None else target.quantised(layers.quant)

        return Subject(self.name, target, draft)


def _quantised(model: VideoLM, quant: str | None) -> VideoLM:
    return model if quant is None else model.quantised(quant, keep_original=False)
