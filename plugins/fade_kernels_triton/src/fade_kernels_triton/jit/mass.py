"""The mass kernel: how much of its attention each query gives to each packed token, from the keys alone.

Grid ``[tiles, B * H_kv]``. The log-sum-exp over everything is known by then, so that no program needs another's result and
the values are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.codes import codes_by_token, high_half, low_half
from fade_kernels_triton.jit.decode import LOG2E, load_query, normalise
from fade_kernels_triton.jit.packed import tanh


@triton.jit
def mass_kernel(
    QUERY,
    LSE,
    KEY_CODES,
    KEY_LOW,
    KEY_META,
    TABLE,
    COUNT,
    VALID,
    MASS,
    scaling,
    softcap,
    kv_heads,
    max_tiles,
    shown_tiles,
    query_stride_b,
    query_stride_h,
    query_stride_q,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    BITS: tl.constexpr,
    KEY_CHANNEL: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One tile of one row and KV head; ``mass.py`` has the arguments."""
    COLUMNS: tl.constexpr = HEADS * Q_LEN
    number = tl.program_id(0)
    program = tl.program_id(1)
    row = (program // kv_heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    kv_head = (program % kv_heads).to(tl.int64)
    bh = program.to(tl.int64)
    token = tl.arange(0, TILE)
    column = tl.arange(0, N)
    channel = tl.arange(0, DP)
    mass = tl.zeros([TILE, N], tl.float32)
    if number < tl.load(COUNT + bh):
        if TABLE is None:
            tile = bh * max_tiles + number
        else:
            tile = tl.load(TABLE + bh * max_tiles + number).to(tl.int64)
        query = load_query(QUERY, row, kv_head, query_stride_b, query_stride_h, query_stride_q, HEADS, Q_LEN, D, DP, N)
        unit_query, norm = normalise(query)
        words = KEY_CODES + tile * (TILE * (2 if BITS == 3 else BITS) // 16 * D)
        low = KEY_LOW if KEY_LOW is None else KEY_LOW + tile * (TILE // 16 * D)
        codes = codes_by_token(words, low, token, channel, BITS, False, TILE, D).to(tl.float16)
        if KEY_CHANNEL:
            meta = tl.load(KEY_META + tile * D + channel, mask=channel < D, other=0)
            scaled = (unit_query.to(tl.float32) * low_half(meta).to(tl.float32)[:, None]).to(tl.float16)
            bias = tl.sum(unit_query.to(tl.float32) * high_half(meta).to(tl.float32)[:, None], 0)
            score = tl.dot(codes, scaled) + bias[None, :]
        else:
            meta = tl.load(KEY_META + tile * TILE + token)
            score = tl.dot(codes, unit_query) * low_half(meta).to(tl.float32)[:, None]
            score += high_half(meta).to(tl.float32)[:, None] * tl.sum(unit_query.to(tl.float32), 0)[None, :]
        logit = score * (norm * scaling)[None, :]
        if SOFTCAP:
            logit = softcap * tanh(logit / softcap)
        lse = tl.load(LSE + (row * kv_heads * HEADS + kv_head * HEADS + column % HEADS) * Q_LEN + column // HEADS,
                      mask=column < COLUMNS, other=float("-inf"))  # fmt: skip
        seen = (lse > float("-inf"))[None, :]
        if VALID is not None:
            seen = seen & (token < tl.load(VALID + bh * max_tiles + number))[:, None]
        finite = tl.where(lse > float("-inf"), lse, 0.0)
        mass = tl.where(seen, tl.exp2((logit - finite[None, :]) * LOG2E), 0.0)
    for q in tl.static_range(Q_LEN):
        own = tl.sum(tl.where((column // HEADS == q)[None, :], mass, 0.0), 1) / HEADS
        tl.store(MASS + ((bh * Q_LEN + q) * shown_tiles + number) * TILE + token, own)
