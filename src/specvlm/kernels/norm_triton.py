# Triton types a kernel's arguments when it compiles a call.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
"""The Triton code of `specvlm.kernels.norm`, apart so that Triton is imported when it is first needed."""

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(
    x,
    residual,
    weight,
    normed,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program does one row; see `specvlm.kernels.norm.add_rms_norm`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        stream = residual + row * residual_stride + column
        stored = tl.load(stream, mask=inside, other=0.0).to(tl.float32)
        rounded = (total + stored).to(residual.dtype.element_ty)
        tl.store(stream, rounded, mask=inside)
        total = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    unit = (total * factor).to(normed.dtype.element_ty).to(tl.float32)
    tl.store(normed + row * WIDTH + column, (unit * scale).to(normed.dtype.element_ty), mask=inside)
