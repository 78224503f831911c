"""The gated activation of the MLP, read from the fused gate/up projection."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specvlm.kernels import HAS_TRITON

# What a kernel may name, filled in by `_compiled`: Triton refuses other globals, in annotations too.
tl: Any = None
argument = Any
constexpr = int

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
    _compiled()[(rows * tiles,)](
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
def _compiled() -> Any:
    """Return the jitted kernel. Triton is imported on first use, so that it stays optional."""
    language = importlib.import_module("triton.language")
    globals().update(tl=language, argument=language.tensor, constexpr=language.constexpr)
    return importlib.import_module("triton").jit(_kernel)


def _kernel(
    gate_up: argument,
    out: argument,
    stride: argument,
    WIDTH: constexpr,
    TILES: constexpr,
    BLOCK: constexpr,
    PDL: constexpr,
) -> None:
    row = (tl.program_id(0) // TILES).to(tl.int64)
    column = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = gate_up + row * stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (activated * up).to(out.dtype.element_ty), mask=inside)
