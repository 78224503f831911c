# Triton types a kernel's arguments when it compiles a call.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
"""The Triton code of `specvlm.kernels.activation`, apart so that Triton is imported when it is first needed."""

import triton
import triton.language as tl


@triton.jit
def silu_mul(
    gate_up,
    out,
    stride,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program does a part of one row; see `specvlm.kernels.activation.silu_mul`."""
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
