"""The residual addition and the RMS norm behind it, in one kernel.

A Qwen-like decoder layer adds the output of its last projection to the residual stream and norms the sum. In eager
PyTorch that is seven kernels; here a row is read once, summed, normed and written by one program.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specvlm.kernels import HAS_TRITON

_MANY_ROWS = 256  # from here on the rows alone fill the GPU


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and norm the sum: Triton on CUDA, `add_rms_norm_reference` elsewhere.

    Args:
        x: [T, D], rows contiguous.
        residual: [T, D] of x's dtype, rows contiguous; updated in place. None starts the stream: the sum is x itself.
        weight: [D].
        eps: added to the mean square.
        pdl: launch while the kernel before it drains (programmatic dependent launch, compute capability 9 and up).
            `weight` must then be a constant, as it is read before that kernel is done.

    Returns:
        The normed sum [T, D] and the residual stream [T, D]: `residual` itself, or x where that was None.
    """
    if x.is_cuda and HAS_TRITON:
        return add_rms_norm_triton(x, residual, weight, eps, pdl=pdl)
    return add_rms_norm_reference(x, residual, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Do what `add_rms_norm` does with torch operations, rounding where transformers' Qwen2RMSNorm rounds."""
    stream = x if residual is None else residual.add_(x)
    wide = stream.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), stream


def add_rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; the arguments are those of `add_rms_norm`."""
    rows, width = x.shape
    normed = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block, warps = _tiling(rows, width)
    _kernel()[(rows,)](
        x,
        residual,
        weight,
        normed,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        PDL=pdl,
        num_warps=warps,
        enable_fp_fusion=False,  # a fused multiply-add rounds otherwise than torch
        launch_pdl=pdl,
    )
    return normed, x if residual is None else residual


def _tiling(rows: int, width: int) -> tuple[int, int]:
    """Return (elements, warps) of a program: a row each, on more warps while few rows are there to fill the GPU."""
    block = 1 << (width - 1).bit_length()
    elements = 32 if rows >= _MANY_ROWS else 8
    return block, min(max(block // (32 * elements), 1), 16)


@cache
def _kernel() -> Any:
    """Return the jitted kernel. Triton is imported on first use, so that it stays optional."""
    return importlib.import_module("specvlm.kernels.norm_triton").add_rms_norm
