# Triton types a kernel's arguments when it compiles a call.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
"""The Triton code of `specvlm.kernels.rope`, apart so that Triton is imported when it is first needed."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["offset"])
def rope_and_store(
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
    qkv_stride,
    cos_stride,
    sin_stride,
    key_head_stride,
    key_row_stride,
    value_head_stride,
    value_row_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program does a few heads of one token; see `specvlm.kernels.rope.rope_and_store`."""
    token = (tl.program_id(0) // TILES).to(tl.int64)
    head = tl.program_id(0) % TILES * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    partner = (column + WIDTH // 2) % WIDTH
    inside = column < WIDTH
    is_query = inside & (head < HEADS)
    is_key = inside & (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = inside & (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    if q_norm is not None:
        scale = tl.load(q_norm + column, mask=is_query, other=0.0).to(tl.float32)
        scale += tl.load(k_norm + column, mask=is_key, other=0.0).to(tl.float32)
        partner_scale = tl.load(q_norm + partner, mask=is_query, other=0.0).to(tl.float32)
        partner_scale += tl.load(k_norm + partner, mask=is_key, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    source = qkv + token * qkv_stride + head * WIDTH
    stored = tl.load(source + column, mask=is_query | is_key | is_value, other=0.0)
    x = stored.to(tl.float32)
    y = tl.load(source + partner, mask=is_query | is_key, other=0.0).to(tl.float32)
    if q_norm is not None:
        factor = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / WIDTH + eps)
        x = (x * factor).to(stored.dtype).to(tl.float32) * scale
        y = (y * factor).to(stored.dtype).to(tl.float32) * partner_scale
        x = x.to(stored.dtype).to(tl.float32)
        y = y.to(stored.dtype).to(tl.float32)

    wide = cos.dtype.element_ty  # the products' type under torch's promotion, and so where they are rounded
    angle_cos = tl.load(cos + token * cos_stride + column, mask=inside, other=0.0).to(tl.float32)
    angle_sin = tl.load(sin + token * sin_stride + column, mask=inside, other=0.0).to(tl.float32)
    angle_sin = tl.where(column < WIDTH // 2, -angle_sin, angle_sin)
    turned = (x * angle_cos).to(wide).to(tl.float32) + (y * angle_sin).to(wide).to(tl.float32)
    turned = turned.to(stored.dtype)

    tl.store(query + (token * HEADS + head) * WIDTH + column, turned, mask=is_query)
    row = tl.load(start).to(tl.int64) + offset + token
    key_head = (head - HEADS).to(tl.int64)
    tl.store(keys + key_head * key_head_stride + row * key_row_stride + column, turned, mask=is_key)
    value_head = key_head - KV_HEADS
    tl.store(values + value_head * value_head_stride + row * value_row_stride + column, stored, mask=is_value)
