"""Wall time by stage, to the end of what the devices were given to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_STAGES = ("read", "encode", "prefill", "prune", "draft_prefill", "calibrate", "capture", "decode")


def _unheard(name: str) -> None:
    """Do nothing when a stage begins."""


class Seconds:
    """Wall time by stage, without that of stages within it.

    "calibrate" times passes for the policy, "capture" makes CUDA graphs and compiles kernels: both once.
    """

    def __init__(self) -> None:
        self._stages = dict.fromkeys(_STAGES, 0.0)
        self._inner = 0.0  # seconds of the stages that ended within the current one
        self._begin = time.perf_counter()
        self.time_to_first_token = 0.0
        self.total = 0.0
        self.on_stage: Callable[[str], None] = _unheard  # told which stage begins

    @contextmanager
    def stage(self, name: str, *devices: torch.device) -> Iterator[None]:
        """Add the time of the block, to the end of the devices' work, to a stage."""
        self.on_stage(name)
        begin, outer = time.perf_counter(), self._inner
        self._inner = 0.0
        yield
        wait(*devices)
        elapsed = time.perf_counter() - begin
        self._stages[name] += elapsed - self._inner
        self._inner = outer + elapsed

    def __getitem__(self, name: str) -> float:
        return self._stages[name]

    def start(self) -> None:
        """Count time_to_first_token and total from now."""
        self._begin = time.perf_counter()

    def first_token(self) -> None:
        """Note the time of the first token."""
        self.time_to_first_token = time.perf_counter() - self._begin

    def finish(self) -> None:
        """Note the time of the last token."""
        self.total = time.perf_counter() - self._begin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "on_stage": _unheard}  # who listens here is not taken elsewhere

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seconds) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, float]:
        """Return all stages, time_to_first_token and total, in seconds."""
        return {**self._stages, "time_to_first_token": self.time_to_first_token, "total": self.total}


def wait(*devices: torch.device) -> None:
    """Wait for the work that was queued on the current streams of GPUs.

    Not for the whole device: that fails while another thread captures a graph there.
    """
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
