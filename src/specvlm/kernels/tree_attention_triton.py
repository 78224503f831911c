"""The Triton code of `specvlm.kernels.tree_attention`, apart so that Triton is imported when it is first needed.

Split-KV attention ("flash decoding") in two kernels. In `attend_split`, a program walks over a share of the stored rows
for all heads of one key-value head: their query rows are packed (row r is new row r // group, head r % group of the
group), so that every block of keys and values is read once. `merge_splits` joins the programs' results.

Blocks that lie wholly inside the prefix are walked without any mask or bounds test; the remaining rows, the last part
of the prefix and the tree behind it, are masked blocks. Both are shared out on the device, from the prefix length that
stands there.
"""
# ruff: noqa: ANN001, ANN202 - Triton's functions take tensors of its own and constants
# mypy: ignore-errors

import triton
import triton.language as tl

# Without this, a 1 or a multiple of 16 among them, or a start of `sees` off the 16 bytes, compiles the kernel anew.
_VARYING = [
    "num_packed",
    "tree_len",
    "kv_heads",
    "group",
    "tail_cost",
    "splits",
    "block",
    "stride_s",
    "sees",
    "prefix_lens",
]


@triton.jit
def _share(prefix_len, tree_len, splits, tail_cost, block):
    """Return (unmasked blocks, cost of all blocks, splits that have work); a masked block costs tail_cost blocks."""
    plain = prefix_len // block
    masked = tl.cdiv(prefix_len + tree_len - plain * block, block)
    cost = plain + masked * tail_cost
    return plain, cost, tl.minimum(splits, cost)


@triton.jit
def _absorb(query, keys, values, seen, peak, total, out, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """Add a block of keys and values to the running softmax of a tile of M packed rows.

    query [M, D]; keys, values [BLOCK, D]; seen [M, BLOCK]; peak [M], the highest logit in log2 units; total [M], the
    sum of the weights, or [M, BLOCK] that is still to be summed; out [M, D].
    """
    logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits, 1) * SCALE)
    level = higher
    if MASKED:  # a row that has seen nothing yet stands at -inf, and -inf - -inf is NaN
        level = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits * SCALE - level[:, None])
    fade = tl.exp2(peak - level)
    total = total * fade[:, None] + weights if len(total.shape) == 2 else total * fade + tl.sum(weights, 1)
    out = tl.dot(weights.to(values.dtype), values, out * fade[:, None], input_precision="ieee")
    return higher, total, out


@triton.jit
def _load_queries(query, packed, num_packed, stride_row, stride_head, group, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load the packed query rows `packed` of one group as [M, WIDTH], zero behind the last row and behind DIM."""
    dims = tl.arange(0, WIDTH)
    starts = (packed // group) * stride_row + (packed % group) * stride_head
    inside = (packed < num_packed)[:, None] & (dims < DIM)[None, :]
    return tl.load(query + starts[:, None] + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _seen(sees, stride_s, packed, num_packed, behind, tree_len, group):
    """Return as [M, BLOCK] which stored rows, counted from the end of the prefix, are seen."""
    row, column = packed[:, None], behind[None, :]
    in_tree = (column >= 0) & (column < tree_len) & (row < num_packed)
    return (column < 0) | (tl.load(sees + (row // group) * stride_s + column, mask=in_tree, other=0) != 0)


@triton.jit
def _store(partial, levels, packed, num_packed, peak, total, out, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store a tile's outputs, normalised, and the log2 of their weights' sums (-inf where nothing was seen)."""
    row, column = packed[:, None], tl.arange(0, WIDTH)[None, :]
    if len(total.shape) == 2:
        total = tl.sum(total, 1)
    some = tl.where(total > 0, total, 1.0)
    level = tl.where(total > 0, peak + tl.log2(some), float("-inf"))
    tl.store(partial + row * DIM + column, out / some[:, None], mask=(row < num_packed) & (column < DIM))
    tl.store(levels + packed, level, mask=packed < num_packed)


@triton.jit
def _start(ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the (peak, total, out) of a tile that has seen nothing."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    # a small tile's sums go across warps: summing once, at the end, saves two barriers a block
    total = tl.full([ROWS] if ROWS > 32 else [ROWS, BLOCK], 0.0, tl.float32)
    return peak, total, tl.full([ROWS, WIDTH], 0.0, tl.float32)


@triton.jit(do_not_specialize=_VARYING)
def attend_split(
    query, keys, values, prefix_lens, sees, partials, levels,
    num_packed, tree_len, kv_heads, group, tail_cost,
    stride_qb, stride_qr, stride_qh, stride_kb, stride_kh, stride_kr, stride_vb, stride_vh, stride_vr, stride_s,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    ROWS0: tl.constexpr, ROWS1: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Attend a tile of ROWS0 + ROWS1 packed rows to one split's share of the stored rows of one key-value head.

    Grid: (row tiles, splits, batch * key-value heads). `partials` [batch * kv heads, splits, packed rows, DIM] and
    `levels` [batch * kv heads, splits, packed rows] get what `merge_splits` joins; splits without work write nothing.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch, kv_head = tl.program_id(2) // kv_heads, tl.program_id(2) % kv_heads
    prefix_len = tl.load(prefix_lens + batch)
    plain, cost, active = _share(prefix_len, tree_len, splits, tail_cost, BLOCK)
    if split >= active:
        return

    query += batch.to(tl.int64) * stride_qb + kv_head * group * stride_qh
    keys += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    values += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    place = tl.program_id(2).to(tl.int64) * splits + split
    partials += place * num_packed * DIM
    levels += place * num_packed

    first = tl.program_id(0) * (ROWS0 + ROWS1)
    packed0 = first + tl.arange(0, ROWS0)
    query0 = _load_queries(query, packed0, num_packed, stride_qr, stride_qh, group, DIM, WIDTH)
    peak0, total0, out0 = _start(ROWS0, WIDTH, BLOCK)
    if ROWS1:
        packed1 = first + ROWS0 + tl.arange(0, ROWS1)
        query1 = _load_queries(query, packed1, num_packed, stride_qr, stride_qh, group, DIM, WIDTH)
        peak1, total1, out1 = _start(ROWS1, WIDTH, BLOCK)

    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, WIDTH)
    key_offsets = rows[:, None] * stride_kr + dims[None, :]
    value_offsets = rows[:, None] * stride_vr + dims[None, :]
    low, high = split * cost // active, (split + 1) * cost // active
    for block in tl.range(tl.minimum(low, plain), tl.minimum(high, plain), num_stages=STAGES):
        key_block = keys + block * BLOCK * stride_kr + key_offsets
        value_block = values + block * BLOCK * stride_vr + value_offsets
        if WIDTH == DIM:
            k, v = tl.load(key_block), tl.load(value_block)
        else:
            k = tl.load(key_block, mask=(dims < DIM)[None, :], other=0.0)
            v = tl.load(value_block, mask=(dims < DIM)[None, :], other=0.0)
        peak0, total0, out0 = _absorb(query0, k, v, None, peak0, total0, out0, SCALE, False)
        if ROWS1:
            peak1, total1, out1 = _absorb(query1, k, v, None, peak1, total1, out1, SCALE, False)

    tail_low = plain + tl.cdiv(tl.maximum(low - plain, 0), tail_cost)
    tail_high = plain + tl.cdiv(tl.maximum(high - plain, 0), tail_cost)
    for block in tl.range(tail_low, tail_high, num_stages=1):
        behind = block * BLOCK + rows - prefix_len
        inside = (behind < tree_len)[:, None] & (dims < DIM)[None, :]
        k = tl.load(keys + block * BLOCK * stride_kr + key_offsets, mask=inside, other=0.0)
        v = tl.load(values + block * BLOCK * stride_vr + value_offsets, mask=inside, other=0.0)
        seen0 = _seen(sees, stride_s, packed0, num_packed, behind, tree_len, group)
        peak0, total0, out0 = _absorb(query0, k, v, seen0, peak0, total0, out0, SCALE, True)
        if ROWS1:
            seen1 = _seen(sees, stride_s, packed1, num_packed, behind, tree_len, group)
            peak1, total1, out1 = _absorb(query1, k, v, seen1, peak1, total1, out1, SCALE, True)

    _store(partials, levels, packed0, num_packed, peak0, total0, out0, DIM, WIDTH)
    if ROWS1:
        _store(partials, levels, packed1, num_packed, peak1, total1, out1, DIM, WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def merge_splits(
    partials, levels, prefix_lens, output, num_packed, tree_len, kv_heads, group, tail_cost, splits, block,
    stride_ob, stride_or, stride_oh,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Join the splits' outputs of one packed row, weighted by their softmax sums; zeros where nothing was seen.

    Grid: (packed rows, batch * key-value heads). CHUNK splits are taken at a time, always in the same order, so the
    result is deterministic.
    """
    packed = tl.program_id(0)
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    prefix_len = tl.load(prefix_lens + batch)
    _, _, active = _share(prefix_len, tree_len, splits, tail_cost, block)
    if PDL:
        tl.extra.cuda.gdc_wait()
    dims = tl.arange(0, WIDTH)
    first = tl.program_id(1).to(tl.int64) * splits * num_packed + packed
    peak = float("-inf")
    total = 0.0
    out = tl.full([WIDTH], 0.0, tl.float32)
    for start in tl.range(0, active, CHUNK, num_stages=1):
        split = start + tl.arange(0, CHUNK)
        places = first + split * num_packed
        level = tl.load(levels + places, mask=split < active, other=float("-inf"))
        inside = (split < active)[:, None] & (dims < DIM)[None, :]
        part = tl.load(partials + places[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        higher = tl.maximum(peak, tl.max(level, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(level - base)
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, 0)
        out = out * fade + tl.sum(part * weights[:, None], 0)
        peak = higher
    out = out / tl.where(total > 0, total, 1.0)
    place = batch.to(tl.int64) * stride_ob + (packed // group) * stride_or
    place += (kv_head * group + packed % group) * stride_oh
    tl.store(output + place + dims, out.to(output.dtype.element_ty), mask=dims < DIM)
