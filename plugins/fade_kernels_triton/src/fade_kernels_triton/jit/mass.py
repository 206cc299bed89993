"""The mass kernels: how much of its attention each query gives to each token, from the keys alone.

Grids ``[tiles, B * H_kv]`` and, for a window, ``[blocks, B * H_kv]``. The log-sum-exp over everything is known by then, so
that no program needs another's result and the values are not read. What is given is written down, or goes into the statistics
of the tokens at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.codes import codes_by_token, high_half, low_half
from fade_kernels_triton.jit.decode import LOG2E, load_query, normalise
from fade_kernels_triton.jit.packed import tanh
from fade_kernels_triton.jit.window import dot16


@triton.jit
def masses(logit, live, LSE, row, kv_head, kv_heads, softcap, HEADS: tl.constexpr, Q_LEN: tl.constexpr,
           N: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """Probabilities ``[T, N]`` of logits that are scaled and not yet capped; 0 where a token is not ``live`` ``[T, N]``."""
    column = tl.arange(0, N)
    if SOFTCAP:
        logit = softcap * tanh(logit / softcap)
    place = (row * kv_heads * HEADS + kv_head * HEADS + column % HEADS) * Q_LEN + column // HEADS
    lse = tl.load(LSE + place, mask=column < HEADS * Q_LEN, other=float("-inf"))
    finite = tl.where(lse > float("-inf"), lse, 0.0)
    seen = live & (lse > float("-inf"))[None, :]
    return tl.where(seen, tl.exp2((logit - finite[None, :]) * LOG2E), 0.0)


@triton.jit
def note(mass, queries, at, held, bh, tokens, MASS, SUM, SEEN, EMA, LAST, RECENT, decay, keeps, HEADS: tl.constexpr,
         Q_LEN: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Write probabilities ``[T, N]`` of the tokens ``at``, those that are ``held``, or let their statistics follow.

    Args:
        queries: int32 ``[T]``, how many of the queries could attend to each token.
        MASS: float32 ``[B, H_kv, Q, tokens]``, or None to change the statistics, each float32 ``[B, H_kv, tokens]`` or None.
        decay: what a query leaves of EMA; ``keeps``: what all of them leave of RECENT.
    """
    column = tl.arange(0, N)
    given = tl.sum(mass, 1) * 0.0
    faded = given
    fade = 1.0
    for q in tl.static_range(Q_LEN):
        own = tl.sum(tl.where((column // HEADS == q)[None, :], mass, 0.0), 1) / HEADS
        if MASS is not None:
            tl.store(MASS + (bh * Q_LEN + q) * tokens + at, own, mask=held)
        given += own
        faded = faded * decay + own
        fade = fade * decay
    place = bh * tokens + at
    if SUM is not None:
        tl.store(SUM + place, tl.load(SUM + place, mask=held, other=0.0) + given, mask=held)
    if SEEN is not None:
        tl.store(SEEN + place, tl.load(SEEN + place, mask=held, other=0.0) + queries, mask=held)
    if EMA is not None:
        tl.store(EMA + place, tl.load(EMA + place, mask=held, other=0.0) * fade + faded, mask=held)
    if LAST is not None:
        tl.store(LAST + place, own, mask=held)
    if RECENT is not None:
        tl.store(RECENT + place, tl.load(RECENT + place, mask=held, other=0.0) * keeps + given, mask=held)


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
    SUM,
    SEEN,
    EMA,
    LAST,
    RECENT,
    scaling,
    softcap,
    decay,
    keeps,
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
    number = tl.program_id(0)
    program = tl.program_id(1)
    row = (program // kv_heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    kv_head = (program % kv_heads).to(tl.int64)
    bh = program.to(tl.int64)
    token = tl.arange(0, TILE)
    channel = tl.arange(0, DP)
    at = number * TILE + token
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
        live = token >= 0
        if VALID is not None:
            live = token < tl.load(VALID + bh * max_tiles + number)
        logit = score * (norm * scaling)[None, :]
        mass = masses(logit, live[:, None], LSE, row, kv_head, kv_heads, softcap, HEADS, Q_LEN, N, SOFTCAP)
        queries = tl.where(live, Q_LEN, 0)
        note(mass, queries, at, token >= 0, bh, shown_tiles * TILE, MASS, SUM, SEEN, EMA, LAST, RECENT, decay, keeps,
             HEADS, Q_LEN, N)  # fmt: skip
    elif MASS is not None:
        for q in tl.static_range(Q_LEN):
            tl.store(MASS + (bh * Q_LEN + q) * (shown_tiles * TILE) + at, tl.zeros([TILE], tl.float32))


@triton.jit(do_not_specialize=["tokens"])
def window_mass_kernel(
    QUERY,
    LSE,
    KEYS,
    LENGTH,
    MASS,
    SUM,
    SEEN,
    EMA,
    LAST,
    RECENT,
    scaling,
    softcap,
    decay,
    keeps,
    kv_heads,
    tokens,
    query_stride_b,
    query_stride_h,
    query_stride_q,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BLOCK full-precision tokens of one row and KV head, whose newest are the queries' own; ``mass.py`` has the arguments."""
    program = tl.program_id(1)
    row = (program // kv_heads).to(tl.int64)
    kv_head = (program % kv_heads).to(tl.int64)
    bh = program.to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    column = tl.arange(0, N)
    length = tl.load(LENGTH + bh)
    held = at < tokens
    live = at < length
    query = load_query(QUERY, row, kv_head, query_stride_b, query_stride_h, query_stride_q, HEADS, Q_LEN, D, DP, N)
    place = KEYS + row * key_stride_b + kv_head * key_stride_h + at[:, None].to(tl.int64) * key_stride_t
    keys = tl.load(place + channel[None, :], mask=live[:, None] & (channel < D)[None, :], other=0.0)
    logit = dot16(keys, query, INTERPRET) * scaling
    seen = live[:, None] & (at[:, None] <= (length - Q_LEN + column // HEADS)[None, :])
    mass = masses(logit, seen, LSE, row, kv_head, kv_heads, softcap, HEADS, Q_LEN, N, SOFTCAP)
    queries = tl.minimum(tl.maximum(length - at, 0), Q_LEN)
    note(mass, queries, at, held, bh, tokens, MASS, SUM, SEEN, EMA, LAST, RECENT, decay, keeps, HEADS, Q_LEN, N)
