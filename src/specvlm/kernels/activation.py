"""The gated activation of the MLP, read from the fused gate/up projection."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specvlm.kernels import HAS_TRITON

_MANY_ROWS = 256  # from here on the rows alone fill the GPU


def silu_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """Return silu(gate) * up, [T, I]: Triton on CUDA, `silu_mul_reference` elsewhere.

    Args:
        gate_up: [T, 2 * I], rows contiguous, the gate in the first half.
        pdl: launch while the kernel before it drains (programmatic dependent launch, compute capability 9 and up).
    """
    if gate_up.is_cuda and HAS_TRITON:
        return silu_mul_triton(gate_up, pdl=pdl)
    return silu_mul_reference(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Do what `silu_mul` does with torch operations, rounding where transformers' Qwen2MLP rounds."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_triton(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """Launch the kernel; the arguments are those of `silu_mul`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    block, warps = _tiling(rows)
    tiles = -(-width // block)
    _kernel()[(rows * tiles,)](
        gate_up,
        out,
        gate_up.stride(0),
        WIDTH=width,
        TILES=tiles,
        BLOCK=block,
        PDL=pdl,
        num_warps=warps,
        enable_fp_fusion=False,  # a fused multiply-add rounds otherwise than torch
        launch_pdl=pdl,
    )
    return out


def _tiling(rows: int) -> tuple[int, int]:
    """Return (elements, warps) of a program: smaller while few rows are there to fill the GPU."""
    return (2048, 8) if rows >= _MANY_ROWS else (512, 2)


@cache
def _kernel() -> Any:
    """Return the jitted kernel. Triton is imported on first use, so that it stays optional."""
    return importlib.import_module("specvlm.kernels.activation_triton").silu_mul
