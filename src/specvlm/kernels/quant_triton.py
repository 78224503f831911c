# Triton types a kernel's arguments when it compiles a call.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: ignore-errors
"""The Triton code of `specvlm.kernels.quant`, apart so that Triton is imported when it is first needed.

The share-out of tiles is that of `linear_triton`. A tile is BLOCK_N rows of one panel of codes: 64 words of 16 bits a
row, each holding one code of every part of the panel's columns. So a tile is loaded like one of 16-bit numbers, and
each part of it, made numbers of in registers, is a factor of the tensor cores as it lies: nothing is shuffled, and
nothing goes back through shared memory. Two words are turned at once by integer operations that write a code's bits
into a number of known exponent, and a multiply-add that takes the excess away; both are exact.
"""

import triton
import triton.language as tl

from specvlm.kernels.linear_triton import _finish_block, _load_rows, _load_weight

WORDS: tl.constexpr = tl.constexpr(64)  # of a panel's row, and columns of each of its parts

# $0: two numbers; $1: two words; $2 and $3: how far to shift, so that the code lies where the first part's does. A
# nibble in the last places of 128 (bfloat16) or 1024 (float16) adds itself. A byte has one bit more than bfloat16 has
# places: its first bit chooses what is taken away, 128 or 256. An e4m3 exponent is put on the wider one's last places.
INT4_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, one, excess;
    mov.b32 one, 0x3f803f80;
    mov.b32 excess, 0xc308c308;
    shr.u32 a, $1, $2;
    lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, a, one, excess;
}""")
INT4_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, one, excess;
    mov.b32 one, 0x3c003c00;
    mov.b32 excess, 0xe408e408;
    shr.u32 a, $1, $2;
    lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea;
    fma.rn.f16x2 $0, a, one, excess;
}""")
INT8_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, minus;
    mov.b32 minus, 0xbf80bf80;
    shr.u32 b, $1, $2;
    lop3.b32 a, b, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, b, 0x00800080, 0x43804380, 0x6a;
    fma.rn.bf16x2 $0, b, minus, a;
}""")
INT8_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, one, excess;
    mov.b32 one, 0x3c003c00;
    mov.b32 excess, 0xe480e480;
    shr.u32 a, $1, $2;
    lop3.b32 a, a, 0x00ff00ff, 0x64006400, 0xea;
    fma.rn.f16x2 $0, a, one, excess;
}""")
FP8_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, scale, zero;
    mov.b32 scale, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    shl.b32 a, $1, $2;
    shr.u32 b, a, 4;
    and.b32 b, b, 0x07f007f0;
    lop3.b32 a, a, 0x80008000, b, 0xea;
    fma.rn.bf16x2 $0, a, scale, zero;
}""")
FP8_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, scale, zero;
    mov.b32 scale, 0x5c005c00;
    mov.b32 zero, 0x80008000;
    shl.b32 a, $1, $2;
    shr.u32 b, a, 1;
    and.b32 b, b, 0x3f803f80;
    lop3.b32 a, a, 0x80008000, b, 0xea;
    fma.rn.f16x2 $0, a, scale, zero;
}""")


@triton.jit
def _pairs(asm: tl.constexpr, words, shift: tl.constexpr, HALF: tl.constexpr):
    """Run one of the sequences above on all words."""
    return tl.inline_asm_elementwise(
        asm, "=r,r,r,r", [words, shift], dtype=tl.float16 if HALF else tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def _decode(words, PART: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr, GPU: tl.constexpr):
    """Make numbers of `dtype` of one part's codes, of the same shape as the words; no scale is applied."""
    if not GPU:
        if FORMAT == "int4":
            numbers = ((words >> 4 * PART) & 15).to(tl.float32) - 8.0
        elif FORMAT == "int8":
            numbers = ((words >> 8 * PART) & 255).to(tl.float32) - 128.0
        else:
            code = (words >> 8 * PART).to(tl.int32)
            bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
            numbers = bits.to(tl.float32, bitcast=True) * 2.0**120
        return numbers.to(dtype)
    HALF: tl.constexpr = dtype == tl.float16
    if FORMAT == "int4":
        return _pairs(INT4_FP16 if HALF else INT4_BF16, words, 4 * PART, HALF)
    elif FORMAT == "int8":
        return _pairs(INT8_FP16 if HALF else INT8_BF16, words, 8 * PART, HALF)
    else:
        return _pairs(FP8_FP16 if HALF else FP8_BF16, words, 8 - 8 * PART, HALF)


@triton.jit
def _group_scale(pair, GROUP: tl.constexpr):
    """Return one of the two bfloat16 scales in each 32-bit word, as fp32."""
    bits = pair << 16 if GROUP == 0 else pair & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _fetch_tile(codes, row, rows, BLOCK_N: tl.constexpr):
    """Have a tile brought into the L2, 32 rows of it by one thread of each warp, without waiting."""
    n = row + tl.arange(0, BLOCK_N)
    size = tl.where(tl.arange(0, BLOCK_N) % 32 == 0, tl.minimum(rows - n, 32) * (2 * WORDS), 0)
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}",
        "=r,l,r",
        [codes + n.to(tl.int64) * WORDS, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _multiply(w, x, total, X_LEFT: tl.constexpr):
    """Add w x^T to total, [BLOCK_N, BLOCK_T], or its transpose, which tells Triton other tensor core instructions."""
    if X_LEFT:
        return tl.dot(x, w.T, total)
    else:
        return tl.dot(w, x.T, total)


@triton.jit
def _part(
    words, x, column, T, K, x_stride, total, PART: tl.constexpr,
    FORMAT: tl.constexpr, dtype: tl.constexpr, BLOCK_T: tl.constexpr, X_LEFT: tl.constexpr, X_TMA: tl.constexpr,
    EVEN_K: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Add one part's product to total."""
    rows = _load_rows(x, column + WORDS * PART, T, K, x_stride, BLOCK_T, WORDS, X_TMA, EVEN_K)
    return _multiply(_decode(words, PART, FORMAT, dtype, GPU), rows, total, X_LEFT)


@triton.jit(do_not_specialize=["T", "programs", "prefetch", "trigger", "num_squares"])
def stream_quant(
    x, codes, code_rows, scales, bias, y, partial, arrivals, T, N, K, x_stride, programs, prefetch, trigger,
    squares, num_squares, eps, squares_out, SQUARES: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
    X_LEFT: tl.constexpr, TMA: tl.constexpr, X_TMA: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PDL: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Compute y = x W^T (+ bias).

    Args: x [T, K] as a pointer, or with X_TMA as the descriptor of its tiles; codes [panels * N, 64], int16, as a
    pointer or with TMA as a descriptor; code_rows the pointer to the codes; scales [N] fp32, for int4 [panels, N] pairs
    of bfloat16; EVEN_N and EVEN_K: no tile reaches over that edge; X_LEFT: see `_multiply`; squares, num_squares, eps,
    squares_out, SQUARES, GATED, ADDED: see `_store`. The others are those of `stream_linear`.
    """
    GROUPED: tl.constexpr = FORMAT == "int4"
    PARTS: tl.constexpr = 4 if GROUPED else 2
    program = tl.program_id(0)
    k_tiles = (K + PARTS * WORDS - 1) // (PARTS * WORDS)
    tiles = (N + BLOCK_N - 1) // BLOCK_N * k_tiles
    first = tiles * program // programs
    last = tiles * (program + 1) // programs
    if PDL:
        for index in range(first, tl.minimum(first + prefetch, last)):
            _fetch_tile(code_rows, index % k_tiles * N + index // k_tiles * BLOCK_N, k_tiles * N, BLOCK_N)
        tl.extra.cuda.gdc_wait()

    dtype: tl.constexpr = y.dtype.element_ty
    zero = tl.full((BLOCK_T, BLOCK_N) if X_LEFT else (BLOCK_N, BLOCK_T), 0.0, tl.float32)
    total = zero
    for index in tl.range(first, last, num_stages=STAGES):
        block = index // k_tiles
        k = index - block * k_tiles
        row = block * BLOCK_N
        column = k * (PARTS * WORDS)
        words = _load_weight(codes, k * N + row, 0, k_tiles * N, WORDS, WORDS, BLOCK_N, WORDS, TMA, EVEN_N)
        if GROUPED:
            n = row + tl.arange(0, BLOCK_N)
            pair = tl.load(scales + k * N + n, mask=None if EVEN_N else n < N)  # behind N no result is kept
            pair = pair[None, :] if X_LEFT else pair[:, None]
            for group in tl.static_range(2):
                part = zero
                for half in tl.static_range(2):
                    part = _part(words, x, column, T, K, x_stride, part, 2 * group + half,
                                 FORMAT, dtype, BLOCK_T, X_LEFT, X_TMA, EVEN_K, GPU)  # fmt: skip
                total += part * _group_scale(pair, group)
        else:
            for half in tl.static_range(2):
                total = _part(words, x, column, T, K, x_stride, total, half,
                              FORMAT, dtype, BLOCK_T, X_LEFT, X_TMA, EVEN_K, GPU)  # fmt: skip
        if PDL:  # noqa: SIM102 - one is known when compiling, the other is not
            if index == tl.maximum(first, last - trigger):
                tl.extra.cuda.gdc_launch_dependents()

        ends = k == k_tiles - 1
        if ends | (index == last - 1):
            _finish_block(
                y, total.T if X_LEFT else total, scales, bias, partial, arrivals, block, index - k, first, tiles,
                k_tiles, ends, program, programs, T, N, squares, num_squares, K, eps, squares_out,
                not GROUPED, HAS_BIAS, SQUARES, GATED, ADDED, GPU,
            )  # fmt: skip
            total = zero


@triton.jit
def dequantize(
    codes, scales, y, begin, N, K, panels_n,
    FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Write rows `begin` to begin + N of the weight into y [N, K]; panels_n: rows of a panel. Arguments as above."""
    GROUPED: tl.constexpr = FORMAT == "int4"
    PARTS: tl.constexpr = 4 if GROUPED else 2
    panel = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, WORDS)
    row = (panel * panels_n + begin + n).to(tl.int64)
    words = tl.load(codes + row[:, None] * WORDS + word[None, :], mask=(n < N)[:, None], other=0)
    if GROUPED:
        scale = tl.load(scales + row, mask=n < N, other=0)
    else:
        scale = tl.load(scales + begin + n, mask=n < N, other=0.0)
    for part in tl.static_range(PARTS):
        numbers = _decode(words, part, FORMAT, y.dtype.element_ty, GPU).to(tl.float32)
        by = _group_scale(scale, part // 2) if GROUPED else scale
        k = (panel * PARTS + part) * WORDS + word
        inside = (n < N)[:, None] & (k < K)[None, :]
        values = (numbers * by[:, None]).to(y.dtype.element_ty)
        tl.store(y + n.to(tl.int64)[:, None] * K + k[None, :], values, mask=inside)
