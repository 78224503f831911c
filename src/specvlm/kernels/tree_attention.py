"""Attention of q new rows, the rows of a tree, over a long stored prefix and the tree itself.

Decoding reads the whole KV cache in every layer, so the kernel is measured by how near it comes to reading each byte
once at the device's read rate. Three things bring it there. The rows of all query heads that share a key-value head are
packed into one matrix, which meets every block of keys and values once. The stored rows are split over all
multiprocessors, and a second kernel merges the splits. No mask is looked at inside the prefix, which all rows see; the
tree's mask costs one or two blocks behind it.

The prefix length stays on the device: one CUDA graph serves every length, because the grid follows from the capacity of
the storage alone.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from specvlm.core.errors import ConfigError
from specvlm.kernels import HAS_TRITON, has_pdl

MAX_ROWS = 128  # a verification pass: the root and 127 tree nodes
MAX_TREE_LEN = 255  # rows behind the prefix
MAX_HEAD_DIM = 128
_MERGE_CHUNK = 64  # splits that the merge takes at a time
_DEEP_PIPELINE_BYTES = 160 << 10  # shared memory that every layout fits, an A100's and more; an RTX 4090 has 100 KiB
_INTERPRETED_PROCESSORS = 6  # stands for the multiprocessors where the kernel is interpreted


@dataclass(frozen=True)
class Config:
    """How the kernels are laid out; every choice gives the same result up to rounding.

    Args:
        rows: packed rows of the two tiles that one program holds; the second may be 0. Powers of two.
        block: stored rows of one step.
        warps: warps of a program.
        stages: depth of the load pipeline.
        programs: programs that share one multiprocessor.
        tail_cost: what a masked block counts when work is shared out, in unmasked blocks.
        merge_warps: warps of a program of the merge, which joins one packed row.
        overlap: start the kernels while their predecessor drains (programmatic dependent launch, from Hopper on).
    """

    rows: tuple[int, int]
    block: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2
    tail_cost: int = 3
    merge_warps: int = 2
    overlap: bool = True


def choose_config(num_packed: int, kv_heads: int, is_half: bool = True) -> Config:
    """Return the layout that was fastest on an H200; 182 rows took 37.9 us in two (128, 0) tiles, 44.5 in (128, 64).

    Args:
        num_packed: packed rows: new rows x query heads that share a key-value head.
        kv_heads: key-value heads of the whole batch.
        is_half: whether the inputs are of a 2-byte type, which the tensor cores take.
    """
    merge_warps = 2 if num_packed <= 32 else 1
    if not is_half:  # without tensor cores; for checks, not for speed
        return Config((16, 0), block=32, stages=1, merge_warps=merge_warps)
    if num_packed <= 32:
        rows = (16, 0) if num_packed <= 16 else (32, 0)
        if kv_heads > 4:
            return Config(rows, stages=3, programs=2, merge_warps=merge_warps)
        # with two programs, 132 multiprocessors give four heads 66 splits: the merge would need a second step
        return Config(rows, stages=4, programs=1, merge_warps=merge_warps)
    if num_packed <= 64:
        return Config((64, 0), stages=4, programs=1, merge_warps=merge_warps)
    if num_packed <= 128:
        return Config((128, 0), warps=8, stages=4, programs=1, merge_warps=merge_warps)
    rows = (128, 16) if num_packed <= 144 else (128, 0)
    return Config(rows, warps=8, stages=3, programs=1, merge_warps=merge_warps)


def _fitting(config: Config, shared_bytes: int) -> Config:
    """Return a layout for multiprocessors of this much shared memory: a short pipeline fits in 84 KiB."""
    return config if shared_bytes >= _DEEP_PIPELINE_BYTES else replace(config, stages=min(config.stages, 2))


@dataclass(frozen=True)
class _Grid:
    """What follows from a config and the shapes: see `attend_split`."""

    row_tiles: int
    splits: int
    num_packed: int
    heads: int  # key-value heads of the whole batch

    def workspace_size(self, head_dim: int) -> int:
        """Number of float32 values that the splits hand to the merge."""
        return self.heads * self.splits * self.num_packed * (head_dim + 1)


def _grid(config: Config, num_packed: int, heads: int, capacity: int | None, processors: int) -> _Grid:
    """Lay out the grid; without a capacity, for the largest one."""
    row_tiles = math.ceil(num_packed / sum(config.rows))
    splits = max(1, processors * config.programs // (row_tiles * heads))
    if capacity is not None:
        splits = min(splits, math.ceil(capacity / config.block))
    return _Grid(row_tiles, splits, num_packed, heads)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _DEEP_PIPELINE_BYTES
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def is_served(head_dim: int) -> bool:
    """Whether the kernel runs on a GPU with heads of this size: Triton is there, and the size is allowed."""
    return HAS_TRITON and _is_allowed(head_dim)


def _is_allowed(head_dim: int) -> bool:
    return 8 <= head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


def workspace_for(
    batch: int,
    max_rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return a float32 buffer that serves `tree_attention` with 1 to `max_rows` new rows and any capacity.

    All layers may share one: it is free again when the call's kernels are done.
    """
    processors = _processors(torch.device(device))
    sizes = []
    for num_packed in range(heads // kv_heads, max_rows * heads // kv_heads + 1, heads // kv_heads):
        config = choose_config(num_packed, batch * kv_heads, dtype != torch.float32)
        sizes.append(_grid(config, num_packed, batch * kv_heads, None, processors).workspace_size(head_dim))
    return torch.empty(max(sizes), dtype=torch.float32, device=device)


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_len: Tensor,
    sees: Tensor,
    *,
    scaling: float,
    workspace: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Attend with q new rows to a stored prefix and to the tree rows behind it.

    Nothing is read on the host and nothing is synchronised, so a captured call serves other prefix lengths too. The
    result is deterministic.

    Args:
        query: [B, q, H, d], 1 <= q <= 128, bfloat16, float16 or float32 (slow, for checks); d is a multiple of 8 up
            to 128.
        keys: [B, H_kv, capacity, d] view of the KV storage, last dimension contiguous. The new rows are stored already.
        values: like keys.
        prefix_len: [B] int32 on the device: the rows before are seen by all new rows. prefix_len + m <= capacity.
        sees: [q, m] bool, q <= m <= 255: what each new row sees of the m rows stored behind the prefix, the last q of
            which are the new rows.
        scaling: factor of the logits.
        workspace: from `workspace_for`; None allocates one.
        config: layout of the kernels; None chooses one.

    Returns:
        [B, q, H, d] in the query's dtype, contiguous; zeros for a row that sees nothing.

    Raises:
        ConfigError: the arguments do not fit, or Triton is missing.
    """
    _check(query, keys, values, prefix_len, sees)
    kernels = _load_kernels(query.device)
    batch, num_rows, heads, dim = query.shape
    kv_heads, capacity, tree_len = keys.shape[1], keys.shape[2], sees.shape[1]
    group = heads // kv_heads
    if config is None:
        config = choose_config(num_rows * group, batch * kv_heads, query.dtype != torch.float32)
        config = _fitting(config, _shared_bytes(query.device))
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":  # the interpreter multiplies its bits as integers
        query, keys, values = query.float(), keys.float(), values.float()
        wide = tree_attention(
            query, keys, values, prefix_len, sees, scaling=scaling, workspace=workspace, config=config
        )
        return wide.bfloat16()
    grid = _grid(config, num_rows * group, batch * kv_heads, capacity, _processors(query.device))
    size = grid.workspace_size(dim)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=query.device)
    elif workspace.numel() < size:
        raise ConfigError(f"workspace holds {workspace.numel()} values, {size} are needed: use workspace_for")
    partials, levels = workspace[: size - size // (dim + 1)], workspace[size - size // (dim + 1) :]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    overlap = {"launch_pdl": True} if config.overlap and has_pdl(query.device) else {}
    width = max(16, 1 << (dim - 1).bit_length())
    kernels.attend_split[grid.row_tiles, grid.splits, grid.heads](
        query, keys, values, prefix_len, sees, partials, levels,
        grid.num_packed, tree_len, kv_heads, group, config.tail_cost,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], sees.stride(0),
        DIM=dim, WIDTH=width, SCALE=scaling * math.log2(math.e),
        ROWS0=config.rows[0], ROWS1=config.rows[1], BLOCK=config.block, STAGES=config.stages, PDL=bool(overlap),
        num_warps=config.warps, **overlap,
    )  # fmt: skip
    kernels.merge_splits[grid.num_packed, grid.heads](
        partials, levels, prefix_len, output,
        grid.num_packed, tree_len, kv_heads, group, config.tail_cost, grid.splits, config.block, *output.stride()[:3],
        DIM=dim, WIDTH=width, CHUNK=min(1 << (grid.splits - 1).bit_length(), _MERGE_CHUNK), PDL=bool(overlap),
        num_warps=config.merge_warps, **overlap,
    )  # fmt: skip
    return output


def tree_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, prefix_len: Tensor, sees: Tensor, *, scaling: float
) -> Tensor:
    """Compute what `tree_attention` does in plain torch, in float32, on any device."""
    _check(query, keys, values, prefix_len, sees)
    batch, num_rows, _, dim = query.shape
    kv_heads, capacity, tree_len = keys.shape[1], keys.shape[2], sees.shape[1]
    behind = torch.arange(capacity, device=query.device) - prefix_len[:, None]  # [B, capacity]
    in_tree = sees[:, behind.clamp(0, tree_len - 1)].transpose(0, 1)  # [B, q, capacity]
    stored = (behind < tree_len)[:, None]
    seen = ((behind < 0)[:, None] | in_tree & stored)[:, None, None]  # [B, 1, 1, q, capacity]
    garbage = ~stored[..., None]  # whatever stands there may be NaN
    keys, values = (rows.float().masked_fill(garbage, 0.0)[:, :, None] for rows in (keys, values))
    grouped = query.float().transpose(1, 2).reshape(batch, kv_heads, -1, num_rows, dim)  # [B, H_kv, group, q, d]
    logits = (grouped @ keys.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf)
    weights = F.softmax(logits, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return (weights @ values).flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()


def _load_kernels(device: torch.device) -> ModuleType:
    """Import the Triton code for `device`; on the CPU, Triton's interpreter must be on.

    Raises:
        ConfigError: it cannot run there.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"tree_attention does not run on {device}: use a GPU, or tree_attention_reference")
    try:
        from specvlm.kernels import tree_attention_triton
    except ModuleNotFoundError as error:
        raise ConfigError("tree_attention needs Triton: pip install triton, or use tree_attention_reference") from error
    return tree_attention_triton


def _check(query: Tensor, keys: Tensor, values: Tensor, prefix_len: Tensor, sees: Tensor) -> None:
    """Raise a ConfigError that names the first argument that does not fit."""
    batch, num_rows, heads, dim = query.shape
    kv_heads = keys.shape[1]
    if not _is_allowed(dim):
        raise ConfigError(f"head dimension {dim} is not supported: multiples of 8 up to {MAX_HEAD_DIM} are")
    if not 1 <= num_rows <= MAX_ROWS:
        raise ConfigError(f"{num_rows} new rows are not supported: 1 to {MAX_ROWS} are")
    if keys.shape != values.shape or (keys.shape[0], keys.shape[3]) != (batch, dim) or heads % kv_heads:
        raise ConfigError(
            f"keys {list(keys.shape)} and values {list(values.shape)} do not fit query {list(query.shape)}"
        )
    if sees.shape[0] != num_rows or not num_rows <= sees.shape[1] <= MAX_TREE_LEN or sees.dtype != torch.bool:
        raise ConfigError(f"sees {list(sees.shape)} must be bool [{num_rows}, {num_rows} to {MAX_TREE_LEN}]")
    if prefix_len.shape != (batch,) or prefix_len.dtype != torch.int32:
        raise ConfigError(f"prefix_len {prefix_len.dtype} {list(prefix_len.shape)} must be int32 [{batch}]")
    if not query.dtype == keys.dtype == values.dtype:
        raise ConfigError(f"query {query.dtype}, keys {keys.dtype} and values {values.dtype} must be of one dtype")
    for name, tensor in (("query", query), ("keys", keys), ("values", values), ("sees", sees)):
        if tensor.stride(-1) != 1:
            raise ConfigError(f"the last dimension of {name} must be contiguous")
