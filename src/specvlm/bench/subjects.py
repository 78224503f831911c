"""The pairs that are measured: planted ones, or real checkpoints. Nothing is loaded before `load` is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoConfig

from specvlm.bench import planted, published
from specvlm.bench.planted import Cycle
from specvlm.bench.published import Spec
from specvlm.engine import SpecVLM


@dataclass(frozen=True)
class Subject:
    """A loaded pair. `cycle` is what its text should follow, None for real checkpoints."""

    name: str
    model: SpecVLM
    cycle: Cycle | None


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
        """Load target and draft onto the device."""
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
        """Build and plant target and draft on the device."""
        cycle = Cycle.of(self.target, self.seed)
        common: dict[str, Any] = {"cycle": cycle, "device": device, "dtype": dtype, "seed": self.seed}
        target = planted.build(self.target, **common)
        return Subject(self.name, SpecVLM(target, planted.build(self.draft, is_draft=True, **common)), cycle)


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
        """Load target and draft onto the device."""
        number = str(dtype).removeprefix("torch.")
        model = SpecVLM.from_pretrained(self.target, draft=self.draft, device=str(device), dtype=number)
        return Subject(self.name, model, None)
