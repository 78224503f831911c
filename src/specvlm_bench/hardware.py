"""The yardstick: how fast the device reads its memory, and how long its work takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specvlm.runtime.graphs import on
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import Served

_REPEATS = 20
_WARM_UP = 3


def timed(
    calls: Sequence[Callable[[], object]], device: torch.device, repeats: int, between: Callable[[], object]
) -> list[list[float]]:
    """Return the milliseconds of each call in `repeats` rounds over them all, a list a call.

    On a GPU the time lies between two CUDA events and nothing waits in between, so that it is the device's own.
    `between` runs after each round, outside the clock.
    """
    if device.type != "cuda":
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(repeats):
            for call, found in zip(calls, times, strict=True):
                begin = time.perf_counter()
                call()
                found.append(1e3 * (time.perf_counter() - begin))
            between()
        return times
    rounds = []
    with on(device):  # else events are recorded on another GPU's stream
        for _ in range(repeats):
            marks = [_mark()]
            for call in calls:
                call()
                marks.append(_mark())
            rounds.append(marks)
            between()
    torch.cuda.synchronize(device)
    return [[marks[n].elapsed_time(marks[n + 1]) for marks in rounds] for n in range(len(calls))]


def _mark() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def read_rate(device: torch.device) -> float:
    """Return how many GB (1e9 bytes) a second the device reads, measured by the sum of a large tensor.

    A copy is no yardstick: it also writes, and captured in a CUDA graph it moves less than an eager one.
    """
    size = (4 << 30) if device.type == "cuda" else (128 << 20)  # beyond any cache
    rates = []
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        data = torch.empty(size // dtype.itemsize, dtype=dtype, device=device).uniform_()
        [times] = timed([data.sum], device, _WARM_UP + _REPEATS, lambda: None)
        rates.append(size / statistics.median(times[_WARM_UP:]) / 1e6)
        del data
    return max(rates)


def gpu_name(device: torch.device) -> str | None:
    """Return the GPU's name, None on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def kv_bytes(model: Served, length: int) -> int:
    """Return the bytes of the keys and values of `length` rows."""
    return 2 * math.prod(model.kv_shape) * length * model.dtype.itemsize


def floor_ms(model: Served, length: int, read_gb_s: float) -> float:
    """Return the least milliseconds of a step whose rows see `length` rows: what it must read over the read rate."""
    return (model.step_bytes + kv_bytes(model, length)) / read_gb_s / 1e6


def weight_bytes(*models: VideoLM) -> int:
    """Return the bytes of all weights of the models, vision towers and embedding tables included, each once."""
    weights = {weight.data_ptr(): weight.nbytes for model in models for weight in model.hf.parameters()}
    weights |= {model.head.data_ptr(): model.head.nbytes for model in models if isinstance(model.head, Tensor)}
    quantised = {id(model): model.step_bytes for model in models if model.quant}
    return int(sum(weights.values()) + sum(quantised.values()))
