"""Attention over the full-precision tokens (sinks and recent window) of one row and KV head."""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.packed import LOWEST, tanh


@triton.jit
def dot16(a, b, INTERPRET: tl.constexpr):
    """``tl.dot`` of 16-bit operands; by way of float32 in the interpreter, which would multiply bf16 bit patterns."""
    if INTERPRET:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def attend_window(
    query,
    scale,
    softcap,
    cap_scale,
    KEYS,
    VALUES,
    POSITIONS,
    key_stride,
    value_stride,
    start,
    stop,
    length,
    query_token,
    query_position,
    window,
    Q_LEN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLIDING: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Attend to tokens ``start .. stop`` of a buffer that holds ``length``; the newest are the queries' own.

    Args:
        query: ``[DP, N]`` in the model's dtype, unscaled.
        scale: softmax scale times log2(e).
        softcap: soft cap times log2(e); ``cap_scale`` is the softmax scale over the soft cap.
        POSITIONS: int32 positions of the buffer's tokens, negative for none; None if they are in order.
        query_token: int32 ``[N]``, which of the ``Q_LEN`` query tokens a column belongs to.

    Returns:
        ``(maximum [N] in base-2 units, total [N], out [DP, N] unnormalised)``.
    """
    channel = tl.arange(0, DP)
    peak = tl.full([N], LOWEST, tl.float32)
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([DP, N], tl.float32)
    for first in tl.range(start, stop, BLOCK, num_stages=2):
        token = first + tl.arange(0, BLOCK)
        held = token < length
        if POSITIONS is not None:
            position = tl.load(POSITIONS + token, mask=held, other=-1)
            held = position >= 0
        mask = held[:, None] & (channel < D)[None, :]
        keys = tl.load(KEYS + token[:, None].to(tl.int64) * key_stride + channel[None, :], mask=mask, other=0.0)
        score = dot16(keys, query, INTERPRET)
        if SOFTCAP:
            score = softcap * tanh(score * cap_scale)
        else:
            score = score * scale
        seen = tl.broadcast_to(held[:, None], BLOCK, N)
        if POSITIONS is not None:
            seen = seen & (position[:, None] <= query_position[None, :])
            if SLIDING:
                seen = seen & (query_position[None, :] - position[:, None] < window)
        elif Q_LEN > 1:
            seen = seen & (token[:, None] <= (length - Q_LEN + query_token)[None, :])
        score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))
        shrink = tl.exp2(peak - new_peak)
        weight = tl.exp2(score - new_peak[None, :])
        total = total * shrink + tl.sum(weight, 0)
        values = tl.load(VALUES + token[:, None].to(tl.int64) * value_stride + channel[None, :], mask=mask, other=0.0)
        out = out * shrink[None, :] + dot16(tl.trans(values), weight.to(values.dtype), INTERPRET)
        peak = new_peak
    return peak, total, out
