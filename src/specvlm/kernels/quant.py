"""Weight-only quantised linear layers for drafts: fp8, int8 and int4.

A draft's step is bound by reading its weights, and a draft may err: what verification keeps does not depend on it. So
its weights are stored in one byte, or in half a byte, and made numbers of again in the product's registers; rows,
sums and results stay what they were.

fp8 (e4m3) and int8 have one fp32 scale for each output; int4 has one bfloat16 scale for each output and 128 inputs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specvlm.core.errors import ConfigError
from specvlm.core.names import QUANTS
from specvlm.kernels import HAS_TRITON
from specvlm.kernels.stream import HEAD_OUTPUTS, LinearPlan, programs_of, tiles, workspace

GROUP = 128  # inputs that share a scale of int4
MAX_ROWS = 64

_WORDS = 64  # 16-bit words of a panel's row; the kernel relies on it
_FP8_MAX = 448.0
_CHUNK = 1 << 22  # weights quantised at a time
_DENSE_CHUNK = 1 << 28  # weights of a dequantised product at a time
_CLIPS = tuple(1 - 0.05 * step for step in range(8))  # of int4's scales: .35 covers what Gaussian and long tails want
_CPU_ROWS = 32
_SHARED_BYTES = 226 * 1024  # of a Hopper multiprocessor, less what its programs and barriers take


@dataclass(frozen=True)
class QuantWeight:
    """The quantised weight [N, K] of a linear layer.

    Attributes:
        format: one of `QUANTS`.
        data: the codes. On the CPU, int8 as [N, K] int8, as torch's product wants it. Otherwise [panels, N, 64] int16:
            a panel is 128 (int4: 256) inputs in 2 (4) parts of 64, and a word holds one code of each part, the first
            in its lowest bits. Inputs behind K are zero.
        scales: [N] fp32; for int4 [panels, N] int32, the bfloat16 scales of a panel's two groups, the first in the
            lower half.
        shape: (N, K).
    """

    format: str
    data: Tensor
    scales: Tensor
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.data.nbytes + self.scales.nbytes

    def product(self, x: Tensor, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
        """Return x W^T (+ bias); see `quant_linear`."""
        return quant_linear(x, self, bias, pdl=pdl)


@dataclass(frozen=True)
class QuantPlan(LinearPlan):
    """How one product is cut up: a `LinearPlan` whose block_k counts the words of a panel's row.

    Attributes:
        x_left: the input is the tensor cores' left factor (16 rows or more) rather than the weight.
        x_tma: load the input, too, with the bulk copy engine.
    """

    x_left: bool = False
    x_tma: bool = False


def is_served(format: str, device: torch.device) -> bool:
    """Tell whether a format has a kernel on a device that is faster than the unquantised product.

    These are GPUs of compute capability 8 and up (measured on 9), and for int8 the CPU: torch's product of int8 weights
    takes 0.2 to 0.5 of the time of one of fp32 weights for up to 8 rows.

    Raises:
        ConfigError: the format is unknown.
    """
    _check(format)
    if device.type == "cuda":
        return HAS_TRITON and torch.cuda.get_device_capability(device)[0] >= 8
    return format == "int8" and device.type == "cpu"


@torch.no_grad()
def quantize(weight: Tensor, format: str, columns: Tensor | None = None) -> QuantWeight:
    """Quantise a weight [N, K] of a floating type to the nearest codes, its columns scaled by `columns` [K] before.

    int4's scales are those of eight candidates that leave the smallest squared error. A few million weights are taken
    at a time, so that little memory is needed beside the result.

    Raises:
        ConfigError: the format is unknown.
    """
    _check(format)
    return _quantize(weight, format, columns, panels=weight.device.type != "cpu" or format != "int8")


def dequantize(weight: QuantWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] that the codes stand for."""
    return _dequantize(weight, dtype, 0, weight.shape[0])


def quant_linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """Return x W^T (+ bias), [..., N], in x's type, with the same bits on every run.

    Triton on a GPU for at most 64 rows of a 2-byte type; on the CPU torch's product for int8 and at most 32 rows, which
    are rounded to bfloat16 for it; otherwise the product with the dequantised weight. The workspace is that of
    `specvlm.kernels.linear.linear`, with the same rules.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        pdl: start while the kernel ahead drains; that kernel must not write to the weight, the bias excepted.

    Raises:
        ConfigError: the first call on a device is made while a graph is captured.
    """
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    if _served(rows, weight):
        y = stream_quant(rows, weight, bias, plan=_plan_for(rows, weight, pdl))
    elif weight.data.dtype == torch.int8 and 1 <= len(rows) <= _CPU_ROWS:
        y = _cpu_product(rows, weight, bias)
    else:
        y = quant_linear_reference(rows, weight, bias)
    return y.view(*x.shape[:-1], outputs)


@dataclass(frozen=True)
class Around:
    """What a product does besides, so that no kernel of its own has to.

    Attributes:
        squares: [parts, T] fp32 whose sums are those of the squares of the input's rows, which were not normed: the
            product divides by their root mean square. (A norm's weight belongs into the product's, see `quantize`.)
        eps: added to the mean square.
        is_gated: the weight's rows are gate and up in turn; the result is silu(gate) * up, half as wide.
        residual: [T, N], to which the result is added.
    """

    squares: Tensor | None = None
    eps: float = 0.0
    is_gated: bool = False
    residual: Tensor | None = None


def squares_of(rows: Tensor) -> Tensor:
    """Return the sums of the squares of rows [T, D] as `Around.squares`, in one part: [1, T]."""
    return rows.float().square().sum(1)[None]


def quant_linear_around(
    x: Tensor, weight: QuantWeight, bias: Tensor | None, around: Around, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what a product with its surroundings gives for x [T, K], and the squares of the result's rows.

    The result is [T, N], [T, N / 2] if gated, or the residual stream itself. Its squares mean nothing if it is not.
    """
    if not _served(x, weight):
        return quant_linear_around_reference(x, weight, bias, around)
    plan = _plan_for(x, weight, pdl)
    squares = torch.empty(-(-weight.shape[0] // plan.block_n), len(x), dtype=torch.float32, device=x.device)
    return stream_quant(x, weight, bias, plan=plan, around=around, squares=squares), squares


def quant_linear_around_reference(
    x: Tensor, weight: QuantWeight, bias: Tensor | None, around: Around
) -> tuple[Tensor, Tensor]:
    """Do what `quant_linear_around` does with torch operations."""
    y = quant_linear(x, weight).float()
    if around.squares is not None:
        y = y * (around.squares.sum(0) / x.shape[1] + around.eps).rsqrt()[:, None]
    y = y if bias is None else y + bias.float()
    if around.is_gated:
        y = F.silu(y[:, 0::2]) * y[:, 1::2]
    if around.residual is None:
        return y.to(x.dtype), squares_of(y)
    around.residual.copy_(around.residual.float() + y)
    return around.residual, squares_of(around.residual)


def quant_linear_reference(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """Do what `quant_linear` does, for x [T, K], with the dequantised weight, a part of it at a time if it is large."""
    outputs, inputs = weight.shape
    step = max(1, _DENSE_CHUNK // inputs)
    if step >= outputs:
        return F.linear(x, dequantize(weight, x.dtype), bias)
    y = x.new_empty(x.shape[0], outputs)
    for begin in range(0, outputs, step):
        end = min(begin + step, outputs)
        part = _dequantize(weight, x.dtype, begin, end)
        y[:, begin:end] = F.linear(x, part, None if bias is None else bias[begin:end])
    return y


def plan_quant(format: str, rows: int, outputs: int, inputs: int, sms: int) -> QuantPlan:
    """Choose the plan of a product of [rows, inputs] with [outputs, inputs] on `sms` multiprocessors of a Hopper."""
    block_t = max(8, 1 << (rows - 1).bit_length())
    is_small = block_t == 8 and outputs < HEAD_OUTPUTS
    block_n, warps = (64, 2) if is_small else (128, 4) if block_t <= 32 else (64, 4)
    blocks, k_tiles = -(-outputs // block_n), _panels(format, inputs)
    share = 3 if block_t == 8 else 2 if block_t <= 32 else 1  # programs on a multiprocessor
    if is_small:
        share = 6 if 4 * sms < blocks <= 6 * sms else 4
    x_bytes = 2 * _WORDS * block_t * _parts(format)
    stage = 2 * _WORDS * block_n + x_bytes + (4 * block_n if format == "int4" else 0)
    room = _SHARED_BYTES // share - 2048 - 4 * block_n * block_t - (x_bytes if block_t > 32 else 0)
    return QuantPlan(
        block_t=block_t,
        block_n=block_n,
        block_k=_WORDS,
        stages=min(8, room // stage) + 1,  # one less is held: a tile in registers needs no room
        warps=warps,
        programs=_aligned(blocks, k_tiles, share * sms) if share > 1 else min(sms, blocks * k_tiles),
        prefetch=1,
        trigger=4,
        x_left=block_t == 16 or (block_t == 32 and format != "int4"),
    )


def _aligned(blocks: int, k_tiles: int, most: int) -> int:
    """Return how many programs share the tiles so that each has whole blocks of rows, or a part of one alone.

    A program with parts of two blocks stops twice to hand them on. Even shares count more than many programs do.
    """
    if blocks > most:
        return next(
            (blocks // m for m in range(1, blocks) if blocks % m == 0 and most // 2 <= blocks // m <= most), most
        )

    def cost(parts: int) -> float:
        uneven = -(-k_tiles // parts) * parts / k_tiles
        return uneven * (1.1 - 0.1 * blocks * parts / most)

    return blocks * min(range(1, min(k_tiles, most // blocks) + 1), key=cost)


def stream_quant(
    x: Tensor,
    weight: QuantWeight,
    bias: Tensor | None = None,
    *,
    plan: QuantPlan,
    out: Tensor | None = None,
    around: Around | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """Launch the kernel with a given plan; the arguments are those of `quant_linear`, x as [T, K] and out as [T, N].

    `squares`, [blocks of rows of the plan, T] fp32, takes those of a residual stream.

    Raises:
        ConfigError: the plan asks for more programs or larger blocks than the workspace holds.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    programs = programs_of(plan, outputs, _panels(weight.format, inputs))
    space = workspace(x.device)
    around = around or Around()
    y = around.residual if around.residual is not None else out
    if y is None:
        y = x.new_empty((rows, outputs // 2 if around.is_gated else outputs))
    num_squares = 0 if around.squares is None else len(around.squares)
    codes = weight.data.view(-1, _WORDS)
    _kernels().stream_quant[(programs,)](
        tiles(x, plan.block_t, plan) if plan.x_tma else x,
        tiles(codes, plan.block_n, plan) if plan.tma else codes,
        codes,
        weight.scales,
        bias,
        y,
        space.partial,
        space.arrivals,
        rows,
        outputs,
        inputs,
        x.stride(0),
        programs,
        plan.prefetch,
        plan.trigger,
        around.squares,
        num_squares,
        around.eps,
        squares,
        SQUARES=1 << (num_squares - 1).bit_length() if num_squares else 0,
        GATED=around.is_gated,
        ADDED=around.residual is not None,
        FORMAT=weight.format,
        BLOCK_T=plan.block_t,
        BLOCK_N=plan.block_n,
        STAGES=plan.stages,
        HAS_BIAS=bias is not None,
        X_LEFT=plan.x_left,
        TMA=plan.tma,
        X_TMA=plan.x_tma,
        EVEN_N=outputs % plan.block_n == 0,
        EVEN_K=inputs % (_WORDS * _parts(weight.format)) == 0,
        PDL=plan.pdl,
        GPU=x.is_cuda,
        num_warps=plan.warps,
        **({"launch_pdl": True} if plan.pdl else {}),
    )
    return y


def _check(format: str) -> None:
    if format not in QUANTS:
        raise ConfigError(f"format {format!r} is not one of {', '.join(QUANTS)}")


def _parts(format: str) -> int:
    """Return how many codes a word holds."""
    return 4 if format == "int4" else 2


def _panels(format: str, inputs: int) -> int:
    return -(-inputs // (_WORDS * _parts(format)))


def _served(x: Tensor, weight: QuantWeight) -> bool:
    """Tell whether the kernel takes this product."""
    if not (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and is_served(weight.format, x.device)):
        return False
    return 1 <= x.shape[0] <= MAX_ROWS and x.stride(1) == 1


def _plan_for(x: Tensor, weight: QuantWeight, pdl: bool) -> QuantPlan:
    """Return the plan for these tensors, through pointers where there is no copy engine."""
    device = torch.cuda.get_device_properties(x.device)
    plan = replace(plan_quant(weight.format, x.shape[0], *weight.shape, device.multi_processor_count), pdl=pdl)
    if device.major == 9:
        return plan
    return replace(plan, tma=False, x_tma=False, stages=min(3, plan.stages))


def _kernels() -> Any:
    """Return the module of jitted kernels. Triton is imported on first use, so that it stays optional."""
    return importlib.import_module("specvlm.kernels.quant_triton")


def _cpu_product(x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
    """Multiply with torch's product of int8 weights; the one for fp32 rows is slower than dequantising."""
    ones = torch.ones(weight.shape[0], dtype=torch.bfloat16)
    y = torch._weight_int8pack_mm(x.to(torch.bfloat16), weight.data, ones).float() * weight.scales
    return (y if bias is None else y + bias).to(x.dtype)


def _quantize(weight: Tensor, format: str, columns: Tensor | None = None, *, panels: bool) -> QuantWeight:
    outputs, inputs = weight.shape
    count = _panels(format, inputs)
    padded = count * _WORDS * _parts(format) if panels else inputs
    data_shape = (count, outputs, _WORDS) if panels else (outputs, inputs)
    data = torch.empty(data_shape, dtype=torch.int16 if panels else torch.int8, device=weight.device)
    scale_shape, scale_type = ((count, outputs), torch.int32) if format == "int4" else ((outputs,), torch.float32)
    scales = torch.empty(scale_shape, dtype=scale_type, device=weight.device)
    step = max(1, _CHUNK // padded)
    for begin in range(0, outputs, step):
        rows = slice(begin, min(begin + step, outputs))
        part = weight[rows].float() if columns is None else weight[rows].float() * columns.float()
        part = F.pad(part, (0, padded - inputs))
        if format == "int4":
            codes, steps = _nearest_groups(part)
            scales[:, rows] = steps.view(len(part), count, 2).view(torch.int32)[..., 0].T
        else:
            codes, scales[rows] = _nearest(part, format)
        if panels:
            data[:, rows] = _packed(codes, format).transpose(0, 1)
        else:
            data[rows] = (codes.to(torch.int16) - 128).to(torch.int8)
    return QuantWeight(format, data, scales, (outputs, inputs))


def _nearest(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [n, K], for int8 the integer plus 128, and scales [n]."""
    largest = _FP8_MAX if format == "fp8" else 127.0
    scale = weight.abs().amax(1) / largest
    scale = torch.where(scale > 0, scale, 1.0)
    steps = (weight / scale[:, None]).clamp_(-largest, largest)
    if format == "fp8":
        return steps.to(torch.float8_e4m3fn).view(torch.uint8), scale
    return (steps.round_() + 128).to(torch.uint8), scale


def _nearest_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [n, K], the integer plus 8, and bfloat16 scales [n, K / 128].

    The integers reach from -8 to 7, so a scale has the sign that gives the largest weight the longer side.
    """
    groups = weight.view(len(weight), -1, GROUP)
    top = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best = torch.full_like(top, torch.inf)
    scale = torch.ones_like(top)
    for clip in _CLIPS:
        tried = (top * (clip / -8)).bfloat16().float()
        tried = torch.where(tried == 0, 1.0, tried)
        error = ((groups / tried).round_().clamp_(-8, 7) * tried - groups).square_().sum(2, keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    codes = (groups / scale).round_().clamp_(-8, 7) + 8
    return codes.to(torch.uint8).view(weight.shape), scale.bfloat16()[..., 0].contiguous()


def _packed(codes: Tensor, format: str) -> Tensor:
    """Pack codes [n, panels * parts * 64] into words [n, panels, 64]."""
    parts = codes.view(len(codes), -1, _parts(format), _WORDS).unbind(2)
    if format == "int4":
        parts = (parts[0] | parts[1] << 4, parts[2] | parts[3] << 4)
    return torch.stack(parts, -1).view(torch.int16)[..., 0]


def _unpacked(words: Tensor, format: str) -> Tensor:
    """Undo `_packed`."""
    pairs = words.contiguous().view(torch.uint8).view(*words.shape, 2).unbind(-1)
    if format == "int4":
        pairs = (pairs[0] & 15, pairs[0] >> 4, pairs[1] & 15, pairs[1] >> 4)
    return torch.stack(pairs, 2).view(len(words), -1)


def _dequantize(weight: QuantWeight, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """Return rows `begin` to `end` of the weight."""
    if weight.data.is_cuda and is_served(weight.format, weight.device) and dtype in (torch.bfloat16, torch.float16):
        return _dequantize_triton(weight, dtype, begin, end)
    inputs = weight.shape[1]
    if weight.data.dtype == torch.int8:
        return (weight.data[begin:end] * weight.scales[begin:end, None]).to(dtype)
    codes = _unpacked(weight.data[:, begin:end].transpose(0, 1), weight.format)
    if weight.format == "int4":
        pairs = weight.scales.view(torch.bfloat16).view(*weight.scales.shape, 2)[:, begin:end]
        scales = pairs.transpose(0, 1).flatten(1).float()
        values = ((codes.float() - 8).view(len(codes), -1, GROUP) * scales[..., None]).flatten(1)
    else:
        numbers = codes.view(torch.float8_e4m3fn).float() if weight.format == "fp8" else codes.float() - 128
        values = numbers * weight.scales[begin:end, None]
    return values[:, :inputs].to(dtype)


def _dequantize_triton(weight: QuantWeight, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """Do it in one pass; interpreted on the CPU."""
    outputs, inputs = weight.shape
    block_n = 64
    values = torch.empty((end - begin, inputs), dtype=dtype, device=weight.device)
    _kernels().dequantize[(weight.data.shape[0], -(-(end - begin) // block_n))](
        weight.data,
        weight.scales,
        values,
        begin,
        end - begin,
        inputs,
        outputs,
        FORMAT=weight.format,
        BLOCK_N=block_n,
        GPU=weight.data.is_cuda,
        num_warps=4,
    )
    return values
