"""Norm and rotate query and key, and store key and value, straight from the fused q/k/v projection.

In eager PyTorch a layer takes ten kernels and more for this; here each program reads a few heads of one token once, and
writes them where the attention wants them: the query to a new tensor, key and value to their rows of the KV storage.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specvlm.kernels import HAS_TRITON
from specvlm.kernels.norm import add_rms_norm_reference

_MANY_ROWS = 256  # from here on the tokens alone fill the GPU


def rope_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    offset: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
) -> Tensor:
    """Return the rotated query, and store rotated key and value: Triton on CUDA, the reference elsewhere.

    Rows start + offset to start + offset + T - 1 of the storage are written. `start` stays on the device, so the caller
    has to know that they fit.

    Args:
        qkv: [T, (H + 2 * H_kv) * d], rows contiguous: all query heads, then key heads, then value heads.
        cos, sin: [T, d] in the dtype of qkv or fp32, rows contiguous, the second half of d repeating the first.
        keys, values: [H_kv, capacity, d], views of the KV storage with a contiguous last dimension.
        start: [1] int32 on the device.
        offset: added to start.
        q_norm, k_norm: [d] weights of an RMS norm over each head before the rotation (Qwen3); None for both: no norm.
        eps: added to the mean square of these norms.
        pdl: launch while the kernel before it drains (programmatic dependent launch, compute capability 9 and up).
            q_norm and k_norm must then be constants, as they are read before that kernel is done.

    Returns:
        [T, H, d], contiguous.
    """
    if qkv.is_cuda and HAS_TRITON:
        return rope_and_store_triton(
            qkv, cos, sin, keys, values, start, offset, q_norm=q_norm, k_norm=k_norm, eps=eps, pdl=pdl
        )
    return rope_and_store_reference(qkv, cos, sin, keys, values, start, offset, q_norm=q_norm, k_norm=k_norm, eps=eps)


def rope_and_store_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    offset: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Do what `rope_and_store` does with torch operations, rounding where transformers' Qwen2 and Qwen3-VL round."""
    kv_heads, _, head_dim = keys.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, key, value = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        query = add_rms_norm_reference(query, None, q_norm, eps)[0]
        key = add_rms_norm_reference(key, None, k_norm, eps)[0]
    rows = start + offset + torch.arange(qkv.shape[0], device=qkv.device)
    keys.index_copy_(1, rows, _rotate(key, cos, sin).transpose(0, 1))
    values.index_copy_(1, rows, value.transpose(0, 1))
    return _rotate(query, cos, sin)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [T, h, d] by the angles of their tokens, cos and sin [T, d]."""
    low, high = heads.chunk(2, dim=-1)
    return (heads * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]).to(heads.dtype)


def rope_and_store_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    offset: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
) -> Tensor:
    """Launch the kernel; the arguments are those of `rope_and_store`."""
    rows, (kv_heads, _, head_dim) = qkv.shape[0], keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    block = 1 << (head_dim - 1).bit_length()
    tile_heads, warps = _tiling(rows)
    tiles = -(-(heads + 2 * kv_heads) // tile_heads)
    _kernel()[(rows * tiles,)](
        qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        query,
        keys,
        values,
        start,
        offset,
        eps,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=head_dim,
        TILES=tiles,
        TILE_HEADS=tile_heads,
        BLOCK=block,
        PDL=pdl,
        num_warps=warps,
        enable_fp_fusion=False,  # a fused multiply-add rounds otherwise than torch
        launch_pdl=pdl,
    )
    return query


def _tiling(rows: int) -> tuple[int, int]:
    """Return (heads, warps) of a program: fewer heads while few tokens are there to fill the GPU."""
    return (16, 4) if rows >= _MANY_ROWS else (4, 1)


@cache
def _kernel() -> Any:
    """Return the jitted kernel. Triton is imported on first use, so that it stays optional."""
    return importlib.import_module("specvlm.kernels.rope_triton").rope_and_store
