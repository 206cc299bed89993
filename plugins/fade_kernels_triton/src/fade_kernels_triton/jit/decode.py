"""The decode kernel: every tier and the full-precision window in one launch, and the merge of its parts.

Grid ``[splits, B * H_kv]``. The split index says which segment a program reads: first the splits of tier A, then those
of tier B, then those of the window. The splits of a tier take its tiles in turn, so that each knows its first one before
it knows how many there are. Each writes a normalised output and its base-2 log-sum-exp, and a second small launch merges
them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.packed import attend_packed
from fade_kernels_triton.jit.window import attend_window

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_query(QUERY, row, kv_head, stride_b, stride_h, stride_q, HEADS: tl.constexpr, Q_LEN: tl.constexpr,
               D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Query columns ``[DP, N]`` of one KV head: column ``c`` is query token ``c // HEADS``, head ``c % HEADS``."""
    column = tl.arange(0, N)
    channel = tl.arange(0, DP)
    head = kv_head * HEADS + column % HEADS
    start = row * stride_b + head * stride_h + (column // HEADS) * stride_q
    mask = (column < Q_LEN * HEADS)[None, :] & (channel < D)[:, None]
    return tl.load(QUERY + start[None, :] + channel[:, None], mask=mask, other=0.0)


@triton.jit
def power_above(x):
    """The least power of two that is not below ``x >= 0`` (float32; of 1e-30, if that is more), and its inverse."""
    bits = (tl.maximum(x, 1.0e-30).to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000  # the exponent, rounded up
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def normalise(query):
    """fp16 query columns divided by a power of two each, so that all are at most 1, and that power ``[N]``."""
    wide = query.to(tl.float32)
    power, inverse = power_above(tl.max(tl.abs(wide), 0))
    return (wide * inverse[None, :]).to(tl.float16), power


@triton.jit
def prefetch(POINTER, BYTES: tl.constexpr):
    """Bring ``BYTES`` from ``POINTER`` to the L2 cache; a hint that nothing waits for."""
    LINES: tl.constexpr = (BYTES + 127) // 128
    line = tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [POINTER.to(tl.int64) + 128 * line],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_tile(KEY_CODES, KEY_LOW, KEY_META, VALUE_CODES, VALUE_META, tile, BITS: tl.constexpr,
                  VALUE_BITS: tl.constexpr, GROUPS: tl.constexpr, KEY_CHANNEL: tl.constexpr, TILE: tl.constexpr,
                  D: tl.constexpr):  # fmt: skip
    """Bring a tile's codes and metadata to the L2 cache."""
    KEY_WORDS: tl.constexpr = TILE * (2 if BITS == 3 else BITS) // 16 * D
    VALUE_WORDS: tl.constexpr = TILE * VALUE_BITS // 16 * D
    LOW_WORDS: tl.constexpr = TILE // 16 * D
    KEY_METAS: tl.constexpr = D if KEY_CHANNEL else TILE
    prefetch(KEY_CODES + tile * KEY_WORDS, 2 * KEY_WORDS)
    if KEY_LOW is not None:
        prefetch(KEY_LOW + tile * LOW_WORDS, 2 * LOW_WORDS)
    prefetch(KEY_META + tile * KEY_METAS, 4 * KEY_METAS)
    prefetch(VALUE_CODES + tile * VALUE_WORDS, 2 * VALUE_WORDS)
    prefetch(VALUE_META + tile * (GROUPS * TILE), 4 * GROUPS * TILE)


@triton.jit(do_not_specialize=["splits_a", "splits_b", "splits_w", "max_tiles_a", "max_tiles_b", "window"])
def decode_kernel(
    QUERY,
    QUERY_POSITION,
    A_KEY_CODES,
    A_KEY_LOW,
    A_KEY_META,
    A_VALUE_CODES,
    A_VALUE_META,
    A_TABLE,
    A_COUNT,
    A_VALID,
    A_POSITIONS,
    B_KEY_CODES,
    B_KEY_LOW,
    B_KEY_META,
    B_VALUE_CODES,
    B_VALUE_META,
    B_TABLE,
    B_COUNT,
    B_VALID,
    B_POSITIONS,
    W_KEYS,
    W_VALUES,
    W_LENGTH,
    W_POSITIONS,
    SINK,
    PART,
    PART_LSE,
    OUT,
    LSE,
    scaling,
    softcap,
    window,
    kv_heads,
    max_tiles_a,
    max_tiles_b,
    splits_a,
    splits_b,
    splits_w,
    query_stride_b,
    query_stride_h,
    query_stride_q,
    out_stride_b,
    out_stride_h,
    out_stride_q,
    w_key_stride_b,
    w_key_stride_h,
    w_key_stride_t,
    w_value_stride_b,
    w_value_stride_h,
    w_value_stride_t,
    w_length_stride_b,
    w_length_stride_h,
    w_position_stride_b,
    w_position_stride_h,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    A_BITS: tl.constexpr,
    A_VALUE_BITS: tl.constexpr,
    A_GROUPS: tl.constexpr,
    A_KEY_CHANNEL: tl.constexpr,
    A_TILE: tl.constexpr,
    A_TILES: tl.constexpr,
    B_BITS: tl.constexpr,
    B_VALUE_BITS: tl.constexpr,
    B_GROUPS: tl.constexpr,
    B_KEY_CHANNEL: tl.constexpr,
    B_TILE: tl.constexpr,
    B_TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLIDING: tl.constexpr,
    PREFETCH: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One split of one row and KV head; see the module for the grid and ``decode.py`` for the arguments."""
    split = tl.program_id(0)
    program = tl.program_id(1)
    row = (program // kv_heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    kv_head = (program % kv_heads).to(tl.int64)
    bh = program.to(tl.int64)
    splits = splits_a + splits_b + splits_w
    COLUMNS: tl.constexpr = Q_LEN * HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if PREFETCH:
        if split * A_TILES < max_tiles_a and split < splits_a:
            prefetch_tile(
                A_KEY_CODES, A_KEY_LOW, A_KEY_META, A_VALUE_CODES, A_VALUE_META, bh * max_tiles_a + split * A_TILES,
                A_BITS, A_VALUE_BITS, A_GROUPS, A_KEY_CHANNEL, A_TILE, D,
            )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()  # until here nothing was read and nothing written

    # asked for before the query (the compiler does not move what is volatile), so that both are waited for at once
    if A_BITS > 0:
        count_a = tl.load(A_COUNT + bh, volatile=True)
    if B_BITS > 0:
        count_b = tl.load(B_COUNT + bh, volatile=True)
    if HAS_WINDOW:
        length = tl.load(W_LENGTH + row * w_length_stride_b + kv_head * w_length_stride_h, volatile=True)

    column = tl.arange(0, N)
    channel = tl.arange(0, DP)
    query = load_query(QUERY, row, kv_head, query_stride_b, query_stride_h, query_stride_q, HEADS, Q_LEN, D, DP, N)
    query_token = column // HEADS
    if QUERY_POSITION is not None:
        query_position = tl.load(QUERY_POSITION + row * Q_LEN + query_token, mask=column < COLUMNS, other=0)
    else:
        query_position = query_token
    unit_query, norm = normalise(query)
    scale = norm * (scaling * LOG2E)
    cap_scale = norm * (scaling / softcap)

    top = tl.full([N], -1.0e30, tl.float32)
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([DP, N], tl.float32)
    if split < splits_a:
        if A_BITS > 0:
            top, total, out = attend_packed(
                unit_query, scale, cap_scale, softcap * LOG2E,
                A_KEY_CODES, A_KEY_LOW, A_KEY_META, A_VALUE_CODES, A_VALUE_META,
                A_TABLE if A_TABLE is None else A_TABLE + bh * max_tiles_a,
                A_VALID if A_VALID is None else A_VALID + bh * max_tiles_a,
                A_POSITIONS, bh * max_tiles_a, split * A_TILES, count_a, splits_a * A_TILES, query_position, window,
                A_BITS, A_VALUE_BITS, A_GROUPS, A_KEY_CHANNEL, A_TILE, A_TILES, D, DP, N, STAGES, SOFTCAP, SLIDING, SUBNORMAL,
                INTERPRET,
            )  # fmt: skip
    elif split < splits_a + splits_b:
        if B_BITS > 0:
            part = split - splits_a
            top, total, out = attend_packed(
                unit_query, scale, cap_scale, softcap * LOG2E,
                B_KEY_CODES, B_KEY_LOW, B_KEY_META, B_VALUE_CODES, B_VALUE_META,
                B_TABLE if B_TABLE is None else B_TABLE + bh * max_tiles_b,
                B_VALID if B_VALID is None else B_VALID + bh * max_tiles_b,
                B_POSITIONS, bh * max_tiles_b, part * B_TILES, count_b, splits_b * B_TILES, query_position, window,
                B_BITS, B_VALUE_BITS, B_GROUPS, B_KEY_CHANNEL, B_TILE, B_TILES, D, DP, N, STAGES, SOFTCAP, SLIDING, SUBNORMAL,
                INTERPRET,
            )  # fmt: skip
    elif HAS_WINDOW:
        part = split - splits_a - splits_b
        share = tl.cdiv(tl.cdiv(length, BLOCK), splits_w) * BLOCK
        start = part * share
        stop = tl.minimum(start + share, length)
        top, total, out = attend_window(
            query, scaling * LOG2E, softcap * LOG2E, scaling / softcap,
            W_KEYS + row * w_key_stride_b + kv_head * w_key_stride_h,
            W_VALUES + row * w_value_stride_b + kv_head * w_value_stride_h,
            W_POSITIONS if W_POSITIONS is None
            else W_POSITIONS + row * w_position_stride_b + kv_head * w_position_stride_h,
            w_key_stride_t, w_value_stride_t, start, stop, length, query_token, query_position, window,
            Q_LEN, D, DP, N, BLOCK, SOFTCAP, SLIDING, INTERPRET,
        )  # fmt: skip

    live = total > 0
    out = out * tl.where(live, 1.0 / tl.where(live, total, 1.0), 0.0)[None, :]
    lse = tl.where(live, top + tl.log2(tl.where(live, total, 1.0)), float("-inf"))
    part_column = (bh * splits + split) * COLUMNS + column
    tl.store(
        PART + part_column[None, :] * D + channel[:, None],
        out,
        mask=(column < COLUMNS)[None, :] & (channel < D)[:, None],
    )
    tl.store(PART_LSE + part_column, lse, mask=column < COLUMNS)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    PART,
    PART_LSE,
    SINK,
    OUT,
    LSE,
    splits,
    kv_heads,
    out_stride_b,
    out_stride_h,
    out_stride_q,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid ``[Q_LEN * HEADS, B * H_kv, channels / CHANNELS]``: weigh the parts that were left of one query column by their
    log-sum-exp; write those channels of the output, and the natural log-sum-exp.

    Online over CHUNK parts at a time, whose log-sum-exps and values are asked for together: each wait for them is a large
    part of what merging costs.
    """
    column = tl.program_id(0)
    program = tl.program_id(1)
    block = tl.program_id(2)
    row = (program // kv_heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    kv_head = (program % kv_heads).to(tl.int64)
    bh = program.to(tl.int64)
    head = kv_head * HEADS + column % HEADS
    query = column // HEADS
    COLUMNS: tl.constexpr = Q_LEN * HEADS
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: the next programs would crowd where this layer's end first

    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.arange(0, CHUNK)
    best = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([], tl.float32)
    out = tl.zeros([CHANNELS], tl.float32)
    for first in tl.range(0, splits, CHUNK):
        at = (bh * splits + first + index) * COLUMNS + column
        here = first + index < splits
        lse = tl.load(PART_LSE + at, mask=here, other=float("-inf"), cache_modifier=".cg")
        value = tl.load(
            PART + at[:, None] * D + channel[None, :],
            mask=here[:, None] & (channel < D)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(best, tl.max(lse, 0))
        peak = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(best - peak)
        weight = tl.exp2(lse - peak)
        mass = mass * shrink + tl.sum(weight, 0)
        out = out * shrink + tl.sum(value * weight[:, None], 0)
        best = higher
    if SINK is not None:
        sink = tl.load(SINK + head).to(tl.float32) * LOG2E
        higher = tl.maximum(best, sink)
        peak = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(best - peak)
        mass = mass * shrink + tl.exp2(sink - peak)
        out = out * shrink
        best = higher
    inverse = 1.0 / tl.where(mass > 0, mass, float("inf"))
    target = OUT + row * out_stride_b + head * out_stride_h + query * out_stride_q + channel
    tl.store(target, (out * inverse).to(OUT.dtype.element_ty), mask=channel < D)
    if block == 0:
        lse = tl.where(mass > 0, (best + tl.log2(tl.where(mass > 0, mass, 1.0))) * LN2, float("-inf"))
        tl.store(LSE + (row * kv_heads * HEADS + head) * Q_LEN + query, lse)
