"""What products that stream their weight share: how they are cut up, and the workspace in which shared sums meet."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from specvlm.core.errors import ConfigError

_PARTIAL_FLOATS = 2 * 2 * 132 * 128 * 128  # two partial blocks for each of two programs on each of an H200's SMs
_MAX_BLOCKS = 1 << 16
HEAD_OUTPUTS = 100_000  # more than any layer has, fewer than most vocabularies


class PackedWeight(Protocol):
    """A weight that is no tensor and knows its product."""

    def product(self, x: Tensor, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
        """Return x W^T (+ bias), [..., N]."""
        ...


@dataclass(frozen=True)
class LinearPlan:
    """How one product is cut up.

    Attributes:
        block_t: rows of the input, padded to a power of two of 16 or more.
        block_n: rows of the weight in a tile.
        block_k: columns of a tile.
        stages: tiles in flight.
        warps: warps of a program.
        programs: programs, among which all tiles are shared out evenly.
        tma: load tiles with the bulk copy engine (16-byte aligned rows) rather than through pointers.
        pdl: launch while the kernel ahead drains (programmatic dependent launch).
        prefetch: with `pdl`, tiles a program brings into the L2 before the kernel ahead has ended.
        trigger: with `pdl`, tiles a program has still to do when it lets the next kernel start.
    """

    block_t: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    programs: int
    tma: bool = True
    pdl: bool = False
    prefetch: int = 0
    trigger: int = 1


@dataclass(frozen=True)
class Workspace:
    """What programs that share a block of rows meet in."""

    partial: Tensor  # fp32: sums of blocks of rows that several programs share
    arrivals: Tensor  # int32, one for each block of rows; zero between launches


def programs_of(plan: LinearPlan, outputs: int, k_tiles: int) -> int:
    """Return how many programs share the tiles, at least one each; refuse a plan that outgrows the workspace."""
    blocks = -(-outputs // plan.block_n)
    programs = min(plan.programs, blocks * k_tiles)
    if blocks > _MAX_BLOCKS or 2 * programs * plan.block_n * plan.block_t > _PARTIAL_FLOATS:
        raise ConfigError(f"{plan} does not fit the workspace for {outputs} outputs: take fewer programs")
    return programs


@cache
def workspace(device: torch.device) -> Workspace:
    """Return the device's workspace, which graphs hold on to by address, so that it is never freed or moved."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError("run specvlm.kernels.linear.linear once on this device before a CUDA graph is captured")
    with torch.inference_mode(False):  # whoever asks first, all may write into it
        return Workspace(
            partial=torch.empty(_PARTIAL_FLOATS, dtype=torch.float32, device=device),
            arrivals=torch.zeros(_MAX_BLOCKS, dtype=torch.int32, device=device),
        )


def tiles(matrix: Tensor, rows: int, plan: LinearPlan) -> Any:
    """Return the descriptor by which the copy engine loads [rows, block_k] tiles of a matrix."""
    descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    return descriptor.from_tensor(matrix, [rows, plan.block_k])
