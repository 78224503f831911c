# Triton types a kernel's arguments when it compiles a call.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: ignore-errors
"""The Triton code of `specvlm.kernels.linear`, apart so that Triton is imported when it is first needed.

The weight is cut into tiles of BLOCK_N rows x BLOCK_K columns, counted along the columns first. Every program takes an
even share of that one sequence ("stream-K"), so all multiprocessors stop at the same time whatever the shape, and one
pipelined loop runs over the share: the loads never pause between blocks of rows. The weight tile is the left factor of
the product, [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_T], since the tensor cores want 64 rows or more there.

A block of rows that several programs share is summed by the one that arrives last, always in the order of the programs:
the result has the same bits whoever that is.
"""

import triton
import triton.language as tl


@triton.jit
def _fetch_rows(weight, row, column, rows, K, stride, width, BLOCK_N: tl.constexpr):
    """Have `width` 2-byte columns of BLOCK_N rows brought into the L2, from (row, column) on, without waiting."""
    n = tl.minimum(row + tl.arange(0, BLOCK_N), rows - 1).to(tl.int64)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [weight + n * stride + column, tl.minimum(width, K - column) * 2],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _barrier():
    """Wait for all threads of the program. `tl.debug_barrier` inside a loop would keep Triton from pipelining it."""
    tl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _owner(index, tiles, programs):
    """Return the program whose share holds tile `index`: the last p with tiles * p // programs <= index."""
    return ((index + 1) * programs - 1) // tiles


@triton.jit
def _load_weight(
    source, row, column, rows, K, stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Load the [BLOCK_N, BLOCK_K] weight tile at (row, column); what lies behind `rows` or K is zero."""
    if TMA:
        tile = source.load([row, column])
    else:
        n = row + tl.arange(0, BLOCK_N)
        k = column + tl.arange(0, BLOCK_K)
        pointers = source + n.to(tl.int64)[:, None] * stride + k[None, :]
        if EVEN:
            tile = tl.load(pointers)
        else:
            inside = (n < rows)[:, None] & (k < K)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def _load_rows(
    source, column, T, K, stride,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Load the [BLOCK_T, BLOCK_K] tile of the input at `column`; what lies behind T or K is zero."""
    if TMA:
        tile = source.load([0, column])
    else:
        t = tl.arange(0, BLOCK_T)
        k = column + tl.arange(0, BLOCK_K)
        inside = (t < T)[:, None]
        if not EVEN:
            inside = inside & (k < K)[None, :]
        pointers = source + t[:, None] * stride + k[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def _root_mean_square(squares, num_squares, t, T, K, eps, SQUARES: tl.constexpr):
    """Return 1 / rms [BLOCK_T] of rows whose squares were summed in parts, [num_squares, T]."""
    part = tl.arange(0, SQUARES)
    inside = (part < num_squares)[:, None] & (t < T)[None, :]
    found = tl.load(squares + part[:, None] * T + t[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    return tl.rsqrt(tl.sum(found, 0) / K + eps)


@triton.jit
def _store(
    y, total, scale, bias, n, t, T, N, block, squares, num_squares, K, eps, squares_out,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SQUARES: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Scale rows n of the product, [BLOCK_N, BLOCK_T], add the bias, round them and store them as columns n of y.

    SQUARES: the input was not normed, and its squares are summed in `num_squares` parts (0: it was). GATED: rows 2 i
    and 2 i + 1 are gate and up of column i. ADDED: y is added to; squares_out takes the squares' sums of its columns n.
    """
    if HAS_SCALE:
        total *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if SQUARES > 0:
        total *= _root_mean_square(squares, num_squares, t, T, K, eps, SQUARES)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        BLOCK_N: tl.constexpr = total.shape[0]
        BLOCK_T: tl.constexpr = total.shape[1]
        pairs = tl.permute(tl.reshape(total, (BLOCK_N // 2, 2, BLOCK_T)), (0, 2, 1))
        gate, up = tl.split(pairs)
        values = gate * tl.sigmoid(gate) * up
        i = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        inside = (i < N // 2)[:, None] & (t < T)[None, :]
        tl.store(y + t[None, :] * (N // 2) + i[:, None], values.to(y.dtype.element_ty), mask=inside)
    else:
        inside = (n < N)[:, None] & (t < T)[None, :]
        places = y + t[None, :] * N + n[:, None]
        if ADDED:
            total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
        values = total.to(y.dtype.element_ty)
        tl.store(places, values, mask=inside)
        if ADDED:
            wide = tl.where(inside, values.to(tl.float32), 0.0)
            tl.store(squares_out + block * T + t, tl.sum(wide * wide, 0), mask=t < T)


@triton.jit
def _sum_partials(partial, cells, low, high, AREA: tl.constexpr):
    """Add up what programs `low` to `high` left of one block of rows, in this order."""
    total = tl.load(partial + (2 * low + 1) * AREA + cells, cache_modifier=".cg")
    for program in range(low + 1, high + 1):
        total += tl.load(partial + 2 * program * AREA + cells, cache_modifier=".cg")
    return total


@triton.jit
def _finish_block(
    y, total, scale, bias, partial, arrivals, block, begin, first, tiles, k_tiles, ends, program, programs, T, N,
    squares, num_squares, K, eps, squares_out,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SQUARES: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """Store a block of rows, whose tiles begin at index `begin`, or what this program has of it.

    The program that arrives last at a block of several programs adds up what they left, [BLOCK_N, BLOCK_T] each.
    """
    BLOCK_N: tl.constexpr = total.shape[0]
    BLOCK_T: tl.constexpr = total.shape[1]
    AREA: tl.constexpr = BLOCK_N * BLOCK_T
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    cells = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + t[None, :]
    begins = begin >= first
    if begins & ends:
        _store(y, total, scale, bias, n, t, T, N, block, squares, num_squares, K, eps, squares_out,
               HAS_SCALE, HAS_BIAS, SQUARES, GATED, ADDED)  # fmt: skip
    else:
        # at most two of a share's blocks are shared: one begun by an earlier program, one left to a later one
        own = partial + (2 * program + begins.to(tl.int32)) * AREA
        tl.store(own + cells, total)
        if GPU:
            _barrier()
        low = _owner(begin, tiles, programs)
        high = _owner(begin + k_tiles - 1, tiles, programs)
        if tl.atomic_add(arrivals + block, 1, sem="acq_rel", scope="gpu") == high - low:
            whole = _sum_partials(partial, cells, low, high, AREA)
            _store(y, whole, scale, bias, n, t, T, N, block, squares, num_squares, K, eps, squares_out,
                   HAS_SCALE, HAS_BIAS, SQUARES, GATED, ADDED)  # fmt: skip
            tl.store(arrivals + block, 0)


@triton.jit(do_not_specialize=["T", "programs", "prefetch", "trigger"])
def stream_linear(
    x, weight, weight_rows, bias, y, partial, arrivals, T, N, K, x_stride, w_stride, programs, prefetch, trigger,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Compute y = x W^T (+ bias).

    Args: x [T, K] and weight [N, K] as pointers, or with TMA as descriptors of their tiles; weight_rows the pointer to
    the weight; bias [N]; y [T, N]; partial: 2 * programs areas of BLOCK_N * BLOCK_T floats; arrivals: a zero for each
    block of rows, left zero; prefetch and trigger count tiles: brought into the L2 before the kernel ahead has ended;
    still to do when the next one may start. EVEN: no tile reaches over the weight's edge. Without GPU (the interpreter)
    programs run one after another.
    """
    program = tl.program_id(0)
    k_tiles = (K + BLOCK_K - 1) // BLOCK_K
    tiles = (N + BLOCK_N - 1) // BLOCK_N * k_tiles
    first = tiles * program // programs
    last = tiles * (program + 1) // programs
    if PDL:
        if prefetch > 0:
            block = first // k_tiles
            column = (first - block * k_tiles) * BLOCK_K
            _fetch_rows(weight_rows, block * BLOCK_N, column, N, K, w_stride, prefetch * BLOCK_K, BLOCK_N)
        tl.extra.cuda.gdc_wait()

    total = tl.full((BLOCK_N, BLOCK_T), 0.0, tl.float32)
    for index in tl.range(first, last, num_stages=STAGES):
        block = index // k_tiles
        k = index - block * k_tiles
        row = block * BLOCK_N
        column = k * BLOCK_K
        w = _load_weight(weight, row, column, N, K, w_stride, BLOCK_N, BLOCK_K, TMA, EVEN)
        rows = _load_rows(x, column, T, K, x_stride, BLOCK_T, BLOCK_K, TMA, EVEN)
        total = tl.dot(w, rows.T, total)
        if PDL:  # noqa: SIM102 - one is known when compiling, the other is not
            if index == tl.maximum(first, last - trigger):
                tl.extra.cuda.gdc_launch_dependents()

        ends = k == k_tiles - 1
        if ends | (index == last - 1):
            _finish_block(
                y, total, None, bias, partial, arrivals, block, index - k, first, tiles, k_tiles, ends, program,
                programs, T, N, None, 0, K, 0.0, None, False, HAS_BIAS, 0, False, False, GPU,
            )  # fmt: skip
            total = tl.full((BLOCK_N, BLOCK_T), 0.0, tl.float32)
