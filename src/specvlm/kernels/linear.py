"""A linear layer for few rows that streams its weight once, at the rate of the memory: y = x W^T.

A decode step multiplies 1 to 128 rows with every weight of the model, so the weights' bytes are its floor. What a
library product loses against that floor is the start and the end of each kernel. Here the weight is shared out evenly
over all multiprocessors whatever its shape, and with `pdl` each kernel starts while the one ahead of it still drains,
and brings its first weights into the L2 meanwhile: weights depend on no kernel.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specvlm.kernels import HAS_TRITON
from specvlm.kernels.stream import HEAD_OUTPUTS, LinearPlan, PackedWeight, programs_of, tiles, workspace

MAX_ROWS = 128

_SHARED_BYTES = 226 * 1024  # what one program may use on compute capability 9, less 1 KiB for barriers


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """Return x W^T (+ bias), [..., N], with the same bits on every run.

    Triton on a Hopper GPU for at most 128 rows of a 2-byte type, `torch.nn.functional.linear` otherwise. Products on
    one device share a workspace: two must not run at once, and the first call must come before any graph is captured.

    Args:
        x: [..., K].
        weight: [N, K], as torch.nn.Linear holds it, or quantised (see `specvlm.kernels.quant.quant_linear`).
        bias: [N].
        pdl: start while the kernel ahead drains; that kernel must not write to the weight, the bias excepted.

    Raises:
        ConfigError: the first call on a device is made while a graph is captured.
    """
    if not isinstance(weight, Tensor):
        return weight.product(x, bias, pdl=pdl)
    if not _served(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    plan = _plan_for(rows, weight, pdl)
    return stream_linear(rows, weight, bias, plan=plan).view(*x.shape[:-1], weight.shape[0])


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what `linear` does with torch operations: sum in fp32 and round once, behind the bias."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def plan_linear(rows: int, outputs: int, inputs: int, sms: int) -> LinearPlan:
    """Choose the plan of a product of [rows, inputs] with [outputs, inputs] on `sms` multiprocessors.

    Measured on an H200 at 1 and 26 rows: long tiles (64 x 256) are fastest for every layer of every size, square ones
    for output heads. With more rows the input's share of the shared memory asks for shorter tiles.
    """
    block_t = max(16, 1 << (rows - 1).bit_length())
    if block_t > 32:
        block_n, block_k = 128, 64
    elif outputs >= HEAD_OUTPUTS:
        block_n, block_k = 128, 128
    else:
        block_n, block_k = 64, 256
    tiles = -(-outputs // block_n) * -(-inputs // block_k)
    stage_bytes = 2 * (block_n + block_t) * block_k
    epilogue_bytes = 4 * block_n * block_t
    return LinearPlan(
        block_t=block_t,
        block_n=block_n,
        block_k=block_k,
        stages=(_SHARED_BYTES - epilogue_bytes) // stage_bytes,
        warps=4,
        programs=min(sms, tiles),
        tma=inputs % 8 == 0,
        prefetch=512 // block_k if inputs % 8 == 0 else 0,
        trigger=4,
    )


def stream_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    plan: LinearPlan,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel with a given plan; the arguments are those of `linear`, x as [T, K] and out as [T, N].

    Raises:
        ConfigError: the plan asks for more programs or larger blocks than the workspace holds.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    programs = programs_of(plan, outputs, -(-inputs // plan.block_k))
    space = workspace(x.device)
    y = x.new_empty((rows, outputs)) if out is None else out
    _kernel()[(programs,)](
        tiles(x, plan.block_t, plan) if plan.tma else x,
        tiles(weight, plan.block_n, plan) if plan.tma else weight,
        weight,
        bias,
        y,
        space.partial,
        space.arrivals,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        programs,
        plan.prefetch,
        plan.trigger,
        BLOCK_T=plan.block_t,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        STAGES=plan.stages,
        HAS_BIAS=bias is not None,
        TMA=plan.tma,
        EVEN=not plan.tma and outputs % plan.block_n == 0 and inputs % plan.block_k == 0,
        PDL=plan.pdl,
        GPU=x.is_cuda,
        num_warps=plan.warps,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
    return y


def _served(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernel takes this product."""
    if not (x.is_cuda and HAS_TRITON and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)):
        return False
    rows = x.numel() // x.shape[-1]
    return 1 <= rows <= MAX_ROWS and weight.stride(1) == 1 and torch.cuda.get_device_capability(x.device)[0] == 9


def _plan_for(x: Tensor, weight: Tensor, pdl: bool) -> LinearPlan:
    """Return the plan for these tensors: that of their shape, through pointers where the copy engine takes no rows."""
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    plan = replace(plan_linear(x.shape[0], weight.shape[0], x.shape[1], sms), pdl=pdl)
    if all(part.data_ptr() % 16 == 0 and part.stride(0) % 8 == 0 for part in (x, weight)):
        return plan
    return replace(plan, tma=False, prefetch=0)


@cache
def _kernel() -> Any:
    """Return the jitted kernel. Triton is imported on first use, so that it stays optional."""
    return importlib.import_module("specvlm.kernels.linear_triton").stream_linear
