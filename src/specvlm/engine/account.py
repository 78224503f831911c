"""The account of one answer: counts, seconds and memory, as `--json` prints them."""

from __future__ import annotations

import dataclasses
import math
import platform
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from specvlm.core.byvalue import ByValue
from specvlm.core.clock import Seconds
from specvlm.core.config import EngineConfig
from specvlm.speculate.policy import Choice


@dataclass
class Usage:
    """Token counts of one request."""

    prompt_tokens: int = 0
    visual_tokens: int = 0  # prunable ones
    kept_visual_tokens: int = 0  # of them, those that the draft saw; 0 where it was never asked
    completion_tokens: int = 0  # with the end-of-sequence token


@dataclass
class Speculation:
    """What drafting brought. A round is a target pass that verifies drafted tokens."""

    rounds: int = 0
    target_passes: int = 0  # the prefill and every pass after it
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # those that stand in the text
    accepted_per_depth: list[int] = field(default_factory=list)  # rounds that accepted a node of depth 1, 2, ...

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count one pass and the drafted tokens of it that stand in the text."""
        self.target_passes += 1
        if num_drafted == 0:
            return
        self.rounds += 1
        self.drafted_tokens += num_drafted
        self.accepted_per_depth += [0] * (num_accepted - len(self.accepted_per_depth))
        self._count(range(num_accepted), 1)

    def cut(self, num_accepted: int, num_left: int) -> None:
        """Take back accepted tokens of the last pass that a stop string cut off the text."""
        self._count(range(num_left, num_accepted), -1)

    def _count(self, depths: range, step: int) -> None:
        self.accepted_tokens += step * len(depths)
        for depth in depths:
            self.accepted_per_depth[depth] += step

    @property
    def mean_accepted_length(self) -> float:
        """Accepted draft tokens a round, without the bonus token (the paper's MAT)."""
        return self.accepted_tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens a round, with the bonus token (vLLM's acceptance length)."""
        return 1 + self.mean_accepted_length


@dataclass(frozen=True, eq=False)
class Decision(ByValue):
    """What a target pass after the prefill was to verify, and what it added."""

    choice: Choice
    num_drafted: int  # nodes that were proposed; 0 beside a choice of some: there was nothing to propose
    num_tokens: int  # new tokens of the text

    def to_dict(self) -> dict[str, Any]:
        """Return nodes and depth of the draft, what was expected of it, and what came, as plain JSON types."""
        choice, times = self.choice, (self.choice.ms, self.choice.plain_ms)
        ms, plain_ms = (None if math.isnan(value) else value for value in times)
        return {
            "nodes": len(choice.topology),
            "drafted": self.num_drafted,
            "depth": choice.topology.depth,
            "is_probe": choice.is_probe,
            "expected_tokens": choice.expected_tokens,
            "expected_ms": ms,
            "plain_ms": plain_ms,
            "tokens": self.num_tokens,
        }


@dataclass(frozen=True)
class Seen:
    """What was read of a video or image."""

    kind: str  # "video" or "image"
    source: str  # what it is called: a path, a URL without its query, "<8 frames>"
    frame_times: tuple[float, ...]  # seconds, of every frame that the model was shown


@dataclass(frozen=True, eq=False)
class Generation(ByValue):
    """A whole answer and its account."""

    text: str
    token_ids: tuple[int, ...]  # with the end-of-sequence token, without anything behind it
    finish_reason: str  # "stop": an end-of-sequence token or a stop string; "length": max_new_tokens
    usage: Usage
    speculation: Speculation
    seconds: Seconds
    peak_memory_bytes: int
    config: EngineConfig
    models: dict[str, str | None]  # target, draft, device, draft_device, draft_quant, dtype
    prompt: str = ""  # what the user said last
    seen: tuple[Seen, ...] = ()  # every video and image of the prompt
    decisions: tuple[Decision, ...] = ()  # one a target pass after the prefill

    def to_dict(self, *, has_decisions: bool = False) -> dict[str, Any]:
        """Return everything as plain JSON types, with the versions of what ran; decisions where they are wanted."""
        speculation = dataclasses.asdict(self.speculation)
        per_depth = speculation.pop("accepted_per_depth")
        return {
            "prompt": self.prompt,
            "media": [dataclasses.asdict(seen) | {"frame_times": list(seen.frame_times)} for seen in self.seen],
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "usage": dataclasses.asdict(self.usage),
            "speculation": {
                **speculation,
                "mean_accepted_length": self.speculation.mean_accepted_length,
                "acceptance_length": self.speculation.acceptance_length,
                "accepted_per_depth": per_depth,
                **({"decisions": [decision.to_dict() for decision in self.decisions]} if has_decisions else {}),
            },
            "seconds": self.seconds.to_dict(),
            "peak_memory_bytes": self.peak_memory_bytes,
            "config": {"models": self.models, **dataclasses.asdict(self.config)},
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Return the versions that decide a result."""
    packages = ("specvlm", "torch", "transformers", "av")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def reset_peak(*devices: torch.device) -> None:
    """Start measuring the peak memory of the GPUs among the devices, or of the process where there is none."""
    gpus = {device for device in devices if device.type == "cuda"}
    for device in gpus:
        torch.cuda.reset_peak_memory_stats(device)
    if not gpus:
        with suppress(OSError):  # elsewhere than on Linux the peak is that since the process began
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure_peak(*devices: torch.device) -> int:
    """Return the peak bytes allocated on the GPUs among the devices, or the process's peak where there is none."""
    gpus = {device for device in devices if device.type == "cuda"}
    if gpus:
        return sum(torch.cuda.max_memory_allocated(device) for device in gpus)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
